"""Style sheet and scripts of the page of the blind test."""

CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#pair .prompt {margin: 0 0 10px; text-align: center; overflow-wrap: anywhere}
#pair .clips {display: grid; grid-template-columns: 1fr 1fr; gap: 8px}
#pair figure {margin: 0; min-width: 0}
#pair video {display: block; width: 100%; max-height: 60vh; object-fit: contain; border-radius: 8px; background: #000}
#pair figcaption {margin-top: 6px; text-align: center}
#votes {flex-wrap: nowrap; align-items: stretch; gap: 8px}
#votes button {min-width: 0 !important; min-height: 52px; padding: 6px 4px}
body:not(.ready) #votes button {opacity: .45}
#status {text-align: center; opacity: .75}
@media (hover: none) {.keys {display: none}}
"""

# Both clips begin together once both can be played to the end, and again when both have ended. Votes count from then
# on, so that a key that is pressed twice is no vote on a pair that was not seen.
SCRIPT = """<script>
const clips = () => [...document.querySelectorAll("#pair video")];
const replay = () => clips().forEach((clip) => { clip.currentTime = 0; clip.play().catch(() => {}); });
const begin = () => {
  const both = clips();
  if (both.length !== 2 || both.some((clip) => clip.readyState < 4) || both[0].dataset.begun) return;
  both[0].dataset.begun = "yes";
  document.body.classList.add("ready");
  replay();
};
document.addEventListener("canplaythrough", begin, true);
document.addEventListener("ended", () => setTimeout(() => clips().every((clip) => clip.ended) && replay(), 300), true);
document.addEventListener("timeupdate", (event) => {
  const [one, other] = clips();
  if (!other || event.target !== one || one.ended || other.ended || other.seeking) return;
  if (Math.abs(one.currentTime - other.currentTime) > 0.1) other.currentTime = one.currentTime;
}, true);
const KEYS = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", T: "tie"};
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches && event.target.matches("input, textarea");
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !clips().length) return;
  if (event.key === " ") replay();
  else if (KEYS[event.key]) document.getElementById("vote-" + KEYS[event.key]).click();
  else return;
  event.preventDefault();
});
</script>"""

VOTE = """() => {
  const shown = document.querySelector("#pair [data-view]");
  const ready = document.body.classList.contains("ready");
  document.body.classList.remove("ready");
  return ready && shown ? shown.dataset.view : "";
}"""

READ_NAME = "() => localStorage.getItem('dit-sparse-rater') || ''"
KEEP_NAME = """(name) => {
  const random = () => "rater-" + Math.random().toString(16).slice(2, 8);
  const chosen = name.trim() || random();
  localStorage.setItem("dit-sparse-rater", chosen);
  return chosen;
}"""
