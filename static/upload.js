// Uploads a file as the body of one PUT, with its progress; XMLHttpRequest, since fetch tells nothing of what is sent.
(() => {
  const form = document.getElementById("upload");
  if (!form) return;
  const [drop, file, name, progress, status, stop] = ["drop", "file", "name", "upload-progress", "upload-status", "upload-stop"].map((id) =>
    document.getElementById(id),
  );

  const nameOf = (fileName) =>
    fileName
      .toLowerCase()
      .replace(/\.(jsonl?|ndjson|txt)$/, "")
      .replace(/[^a-z0-9._-]+/g, "-")
      .replace(/^[^a-z0-9]+/, "")
      .slice(0, 128);
  let proposed = "";
  const propose = () => {
    if (!file.files.length || (name.value && name.value !== proposed)) return;
    name.value = proposed = nameOf(file.files[0].name);
  };
  file.addEventListener("change", propose);

  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.dataset.over = "";
  });
  drop.addEventListener("dragleave", (event) => {
    if (!drop.contains(event.relatedTarget)) delete drop.dataset.over;
  });
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    delete drop.dataset.over;
    if (!event.dataTransfer.files.length) return;
    file.files = event.dataTransfer.files;
    propose();
  });

  const size = (bytes) => (bytes < 2 ** 20 ? `${Math.round(bytes / 1024)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`);
  const tell = (text, kind = "muted") => {
    status.className = `wrap ${kind}`;
    status.textContent = text;
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const [chosen] = file.files;
    const request = new XMLHttpRequest();
    request.open("PUT", form.dataset.url + encodeURIComponent(name.value));
    const headers = JSON.parse(document.body.getAttribute("hx-headers:inherited"));
    for (const [header, value] of Object.entries(headers)) request.setRequestHeader(header, value);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.responseType = "json";
    progress.hidden = stop.hidden = false;
    progress.value = 0;
    request.upload.addEventListener("progress", (sent) => {
      progress.value = sent.loaded / sent.total;
      tell(`${size(sent.loaded)} / ${size(sent.total)}`);
    });
    request.upload.addEventListener("load", () => {
      progress.removeAttribute("value");
      tell(form.dataset.done);
    });
    const finish = () => {
      progress.hidden = stop.hidden = true;
    };
    request.addEventListener("load", () => {
      finish();
      if (request.status < 300) location.assign(form.dataset.page + encodeURIComponent(request.response.name));
      else tell(request.response?.detail ?? `${request.status}`, "bad-text");
    });
    for (const broken of ["error", "timeout"]) {
      request.addEventListener(broken, () => {
        finish();
        tell(form.dataset.broken, "bad-text");
      });
    }
    request.addEventListener("abort", () => {
      finish();
      tell("");
    });
    stop.onclick = () => request.abort();
    request.send(chosen);
  });
})();
