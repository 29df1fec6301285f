"""Style sheet and script of the Gradio page."""

CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#numbers table {width: 100%; font-variant-numeric: tabular-nums}
#numbers th, #numbers td {padding: 6px 8px; border: 1px solid var(--border-color-primary); word-break: normal}
#numbers td:not(:first-child), #numbers th:not(:first-child) {text-align: right}
#numbers td:not(:first-child) {white-space: nowrap}
#numbers th:nth-child(3), #numbers p {overflow-wrap: anywhere}
#clips {justify-content: flex-start}
#status:has(.prose:empty) {display: none}
@media (max-width: 600px) {
  #clips > * {flex: 0 0 calc(50% - 8px) !important}
  #numbers th, #numbers td {padding: 4px; font-size: 13px}
}
#examples .gallery-item {max-width: 100%; white-space: normal; text-align: left}
#examples .gallery-item * {max-width: none; white-space: normal; overflow-wrap: anywhere}
#status {min-height: 0; font-weight: 600}
"""

# The clips have the same length: playing, pausing and seeking one of them applies to all.
SYNCHRONIZED_PLAYBACK = """<script>
const others = (video) => [...document.querySelectorAll("#clips video")].filter((each) => each !== video);
const ours = (event) => event.target.matches && event.target.matches("#clips video");
const follow = (video) => others(video).forEach((each) => {
  if (Math.abs(each.currentTime - video.currentTime) > 0.07) each.currentTime = video.currentTime;
});
document.addEventListener("play", (event) => ours(event) && (follow(event.target),
  others(event.target).forEach((each) => each.paused && each.play().catch(() => {}))), true);
document.addEventListener("pause", (event) => ours(event) && !event.target.ended &&
  others(event.target).forEach((each) => each.paused || each.pause()), true);
document.addEventListener("seeking", (event) => ours(event) && event.target.paused && follow(event.target), true);
document.addEventListener("timeupdate", (event) => ours(event) &&
  event.target === document.querySelector("#clips video") && follow(event.target), true);
</script>"""
