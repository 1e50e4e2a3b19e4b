// The slider of a data set's lengths: each stop was worked out by the server, so that here a line moves and texts change.
(() => {
  const show = () => {
    const part = document.getElementById("lengths");
    if (!part) return;
    const slider = part.querySelector('input[type="range"]');
    const stop = JSON.parse(part.dataset.cuts)[slider.value];
    const line = part.querySelector(".cut");
    line.setAttribute("x1", stop.x);
    line.setAttribute("x2", stop.x);
    const beyond = part.querySelector(".beyond");
    beyond.setAttribute("x", stop.x);
    beyond.setAttribute("width", stop.beyond);
    for (const place of part.querySelectorAll("[data-text]")) place.textContent = stop.texts[place.dataset.text];
    slider.setAttribute("aria-valuetext", stop.texts.max_length);
    part.querySelector('input[type="number"]').value = stop.length;
  };
  document.addEventListener("input", (event) => {
    if (event.target.id === "cut") show();
  });
  // The exact numbers have come, and the slider stays where it was put.
  document.addEventListener("htmx:after:swap", show);
  // A page from the back button may hold the slider where it was left.
  show();
})();
