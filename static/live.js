// The page's one stream: how it stands (the chip), a first connection that failed, rows that the list hasn't got yet.
(() => {
  const log = document.getElementById("log");
  const follow = document.getElementById("follow");
  if (log && follow) {
    const MOST_LINES = 2000;
    const tail = () => {
      while (log.childElementCount > MOST_LINES) log.firstElementChild.remove();
      if (follow.checked) log.scrollTop = log.scrollHeight;
    };
    new MutationObserver(tail).observe(log, { childList: true });
    follow.addEventListener("change", tail);
    // Who scrolls up wants to read; who scrolls down again follows.
    log.addEventListener("scroll", () => {
      follow.checked = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
    });
    tail();
  }

  const source = document.querySelector("[data-live]");
  const chip = document.getElementById("live");
  if (!chip || !source) return;
  const show = (state) => {
    chip.dataset.state = state === "ended" ? "off" : state;
    chip.textContent = chip.dataset[state];
  };

  let isConnected = false;
  let delay = 1000;
  document.addEventListener("htmx:sse:after:connection", () => {
    isConnected = true;
    delay = 1000;
    show("on");
  });
  document.addEventListener("htmx:sse:error", () => show("broken"));
  document.addEventListener("htmx:sse:close", (event) => {
    isConnected = false;
    show(event.detail.reason === "message" ? "ended" : "broken");
  });
  // htmx comes back to a stream that broke, but not to one whose first connection failed.
  const retry = (event) => {
    if (isConnected || event.target !== source) return;
    show("broken");
    setTimeout(() => source.dispatchEvent(new CustomEvent("live:retry")), delay);
    delay = Math.min(delay * 2, 15_000);
  };
  document.addEventListener("htmx:response:error", retry);
  document.addEventListener("htmx:error", retry);
  // A broken stream is noticed when it is read; the chip says so at once when the network is gone.
  window.addEventListener("offline", () => show("broken"));

  const rows = document.getElementById("job-rows");
  document.addEventListener("htmx:before:swap", (event) => {
    if (!rows || rows.dataset.filtered !== undefined) return;
    // A partial without a target is a job that was launched after this list was made.
    if (event.detail.tasks.some((task) => task.type === "partial" && !task.target)) {
      rows.dispatchEvent(new CustomEvent("jobs:new"));
    }
  });
})();
