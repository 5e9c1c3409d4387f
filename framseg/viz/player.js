// The page's side of player.Player: shows the picture, reports keys and clicks, plays the clips that arrive.
function render({ model, el }) {
  const add = (name) => el.appendChild(document.createElement(name));
  const picture = add("div"), video = add("video"), status = add("p"), preview = add("div");
  el.classList.add("framseg-player");
  el.tabIndex = 0;
  el.style.cssText = "outline-offset:-1px;min-width:480px";
  video.controls = true;
  video.autoplay = true;
  video.style.cssText = "width:480px;max-width:100%;max-height:360px;display:none";
  preview.style.cssText = "position:fixed;z-index:9;display:none;pointer-events:none;width:224px;height:168px;" +
    "border:2px solid white;box-shadow:0 1px 6px #0008;background-repeat:no-repeat";

  let clip = null, url = null, keysFrom = 0;  // keysFrom: the time from which on keys count
  const stop = () => {
    if (url) URL.revokeObjectURL(url);
    video.removeAttribute("src");
    video.load();
    video.style.display = "none";
    status.textContent = "";
    clip = url = null;
  };
  const draw = () => {
    stop();
    preview.style.display = "none";
    picture.innerHTML = model.get("value");
    keysFrom = 0;
  };
  const pointed = (event) => {  // the axis under the mouse, the share of its width and the second there
    const axis = event.target.closest(".timed")?.querySelector(".axis");
    if (!axis) return null;
    const box = axis.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    return share < 0 || share > 1 ? null : { axis, share, second: share * axis.dataset.duration };
  };

  picture.addEventListener("click", (event) => {
    const point = pointed(event);
    if (!point) return;
    status.textContent = "…";
    model.send({ kind: "play", second: point.second, end: Number(event.target.dataset.end) || null });
  });
  picture.addEventListener("mousemove", (event) => {
    const point = pointed(event);
    const strip = point && point.axis.closest(".timed").querySelector("image");
    preview.style.display = strip ? "block" : "none";
    if (!strip) return;
    const count = strip.dataset.frames, frame = Math.min(Math.floor(point.share * count), count - 1);
    preview.style.backgroundImage = `url(${strip.getAttribute("href")})`;
    preview.style.backgroundSize = `${224 * count}px 168px`;
    preview.style.backgroundPosition = `${-224 * frame}px 0`;
    preview.style.left = `${Math.min(event.clientX + 14, innerWidth - 240)}px`;
    preview.style.top = `${Math.max(event.clientY - 190, 4)}px`;
  });
  picture.addEventListener("mouseleave", () => { preview.style.display = "none"; });

  video.addEventListener("error", () => {
    if (clip) status.textContent = "this browser cannot play the video's format";
  });
  video.addEventListener("timeupdate", () => {
    for (const line of clip ? picture.querySelectorAll(".cursor") : []) {
      const { left, width, duration } = line.dataset;
      line.setAttribute("visibility", "visible");
      line.setAttribute("transform", `translate(${+left + width * (clip.begin + video.currentTime) / duration})`);
    }
  });

  const widget = () => el.closest(".framseg") ?? el;
  const onFocus = ({ target }) => {  // else the arrow keys would also move the notebook's selection of cells
    if (widget().contains(target)) target.dataset.lmSuppressShortcuts = "true";
  };
  const onKey = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !widget().contains(event.target) || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("input, textarea, video, select:not([size])")) return;
    event.preventDefault();
    if (performance.now() < keysFrom) return;  // a key that is held down waits for each picture
    keysFrom = performance.now() + 2000;
    model.send({ kind: "move", by });
  };
  document.addEventListener("focusin", onFocus);
  document.addEventListener("keydown", onKey, true);

  const onMessage = (message, buffers) => {
    if (message.kind === "moved") keysFrom = 0;
    if (message.kind === "no clip") status.textContent = "";
    if (message.kind !== "clip") return;
    stop();
    clip = message;
    url = URL.createObjectURL(new Blob([buffers[0]], { type: clip.type }));
    video.style.display = "block";
    video.src = `${url}#t=${clip.start - clip.begin},${clip.end - clip.begin}`;
  };
  model.on("change:value", draw);
  model.on("msg:custom", onMessage);
  draw();
  return () => {
    stop();
    document.removeEventListener("focusin", onFocus);
    document.removeEventListener("keydown", onKey, true);
    model.off("change:value", draw);
    model.off("msg:custom", onMessage);
  };
}
export default { render };
