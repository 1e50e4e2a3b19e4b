// A fix is written into the form's inputs by its button; what is not found there, the server fills in.
(() => {
  const form = document.getElementById("job-form");

  const inputOf = (name, text) =>
    form.querySelector(`input[type="radio"][name="${CSS.escape(name)}"][value="${CSS.escape(text)}"]`) ??
    form.querySelector(`:is(input, select, textarea)[id="${CSS.escape(name)}"]`);

  const takes = (input, text) =>
    input && (input.tagName !== "SELECT" || [...input.options].some((option) => option.value === text));

  form.addEventListener("click", (event) => {
    const button = event.target.closest('button[name="_fix"]');
    if (!button) return;
    const fields = Object.entries(JSON.parse(button.value)).map(([name, text]) => [inputOf(name, text), text]);
    if (!fields.every(([input, text]) => takes(input, text))) return;
    event.preventDefault();
    for (const [input, text] of fields) {
      if (input.type === "radio") input.checked = true;
      else input.value = text;
    }
    // Shown to who pressed it, since the button goes with what it mended.
    const [shown] = fields.map(([input]) => input).filter((input) => input.type !== "radio");
    for (let part = shown?.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    shown?.focus({ preventScroll: true });
    form.dispatchEvent(new Event("input", { bubbles: true }));
  });
})();
