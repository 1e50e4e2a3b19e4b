// What every page has: the theme, times in the reader's own zone, forms that are sent once.
(() => {
  const root = document.documentElement;

  const button = document.getElementById("theme");
  const label = () => {
    const theme = root.dataset.theme ?? "auto";
    button.setAttribute("aria-label", button.dataset[theme]);
    button.title = button.dataset[theme];
  };
  if (button) {
    label();
    button.addEventListener("click", () => {
      const next = { auto: "light", light: "dark", dark: "auto" }[root.dataset.theme ?? "auto"];
      if (next === "auto") delete root.dataset.theme;
      else root.dataset.theme = next;
      try {
        localStorage.setItem("pegbox-theme", next);
      } catch {
        // It holds for this page.
      }
      label();
      document.dispatchEvent(new Event("pegbox:theme"));
    });
  }

  const today = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
  const older = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
  // Where the order of seconds matters; the day stands in the title.
  const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  const localise = (part) => {
    for (const time of part.querySelectorAll("time[datetime]:not([title])")) {
      const moment = new Date(time.dateTime);
      time.title = moment.toLocaleString();
      if (time.closest(".log, .timeline")) time.textContent = clock.format(moment);
      else time.textContent = (Date.now() - moment < 43_200_000 ? today : older).format(moment);
    }
  };
  localise(document);
  // A swap brings times as the server writes them, and a morph takes the title away.
  document.addEventListener("htmx:after:swap", () => localise(document));

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "post" || form.dataset.sent) {
      if (form.dataset.sent) event.preventDefault();
      return;
    }
    form.dataset.sent = "yes";
    // Shown again by the back button, it may be sent again; its key keeps one launch one job.
    setTimeout(() => delete form.dataset.sent, 4000);
  });

  const summary = document.getElementById("error-summary");
  if (summary) summary.focus();

  // A link to an input inside a closed group opens the group.
  const reveal = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView({ block: "center" });
    target.focus({ preventScroll: true });
  };
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && link.getAttribute("href") === location.hash) reveal();
  });
  reveal();

  // An alternative is chosen by writing into its input.
  document.addEventListener("input", (event) => {
    const radio = event.target.closest?.(".option")?.querySelector('input[type="radio"]');
    if (radio && radio !== event.target) radio.checked = true;
  });
})();
