// The page's side of ask.Upload: sends a file in pieces, each when the one before has arrived.
const PIECE = 2 << 20;  // bytes

function render({ model, el }) {
  const add = (name) => el.appendChild(document.createElement(name));
  const input = add("input"), said = add("span");
  input.type = "file";
  input.accept = "video/*,.mkv,.avi,.flv";
  input.setAttribute("aria-label", "video to upload");
  let file = null, id = 0;
  const send = async (begin) => {
    const sent = file, piece = await sent.slice(begin, begin + PIECE).arrayBuffer();
    if (file === sent)
      model.send({ id, name: sent.name, begin, last: begin + PIECE >= sent.size }, undefined, [piece]);
  };
  const heard = ({ id: of, received, error }) => {
    if (!file || of !== id) return;  // of a file that another has taken the place of
    const whole = received >= file.size;
    said.textContent = error ?? ` ${whole ? "uploaded" : `${Math.floor((100 * received) / file.size)} % of`} ${file.name}`;
    if (error || whole) file = null;
    else send(received);
  };
  input.addEventListener("change", () => {
    file = input.files[0] ?? null;
    id += 1;
    if (file) send(0);
  });
  model.on("msg:custom", heard);
  return () => model.off("msg:custom", heard);
}
export default { render };
