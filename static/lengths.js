// The slider of a data set's lengths: each stop was worked out by the server, so that here a line moves and texts change.
(() => {
  const part = document.getElementById("lengths");
  if (!part) return;
  const stops = JSON.parse(part.dataset.cuts);
  const slider = part.querySelector('input[type="range"]');
  const line = part.querySelector(".cut");
  const beyond = part.querySelector(".beyond");
  const typed = part.querySelector('input[type="number"]');

  const show = () => {
    const stop = stops[slider.value];
    line.setAttribute("x1", stop.x);
    line.setAttribute("x2", stop.x);
    beyond.setAttribute("x", stop.x);
    beyond.setAttribute("width", stop.beyond);
    for (const place of part.querySelectorAll("[data-text]")) place.textContent = stop.texts[place.dataset.text];
    slider.setAttribute("aria-valuetext", stop.texts.max_length);
    typed.value = stop.length;
  };
  slider.addEventListener("input", show);
  // A page from the back button may hold the slider where it was left.
  show();
})();
