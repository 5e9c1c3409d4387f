// The page's side of ask_form.Upload: sends a file in pieces, each after the one before has been stored.
const PIECE = 2 << 20;  // bytes

function render({ model, el }) {
  const add = (name) => el.appendChild(document.createElement(name));
  const input = add("input"), status = add("span");
  input.type = "file";
  input.accept = "video/*,.mkv,.avi,.flv";
  input.setAttribute("aria-label", "video to upload");
  let file = null, id = 0;
  const send = async (begin) => {
    const chosen = file, piece = await chosen.slice(begin, begin + PIECE).arrayBuffer();
    if (file === chosen)  // and not another by now
      model.send({ id, name: chosen.name, begin, last: begin + PIECE >= chosen.size }, undefined, [piece]);
  };
  const onMessage = ({ id: uploaded, received, error }) => {
    if (!file || uploaded !== id) return;  // about a file that was chosen before this one
    const whole = received >= file.size;
    status.textContent = error ?? ` ${whole ? "uploaded" : `${Math.floor((100 * received) / file.size)} % of`} ${file.name}`;
    if (error || whole) file = null;
    else send(received);
  };
  input.addEventListener("change", () => {
    file = input.files[0] ?? null;
    id += 1;
    if (file) send(0);
  });
  model.on("msg:custom", onMessage);
  return () => model.off("msg:custom", onMessage);
}
export default { render };
