"""Style sheet and script of the Gradio page."""

CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#layout {display: grid; grid-template: "form result" auto "form details" 1fr / minmax(300px, 1fr) minmax(0, 2fr)}
#result {grid-area: result}
#form {grid-area: form}
#details {grid-area: details}
#result, #form, #details {min-width: 0 !important}
#preset .wrap {flex-direction: column; align-items: stretch}
#estimate, #status, .note {font-size: var(--text-sm)}
#options .note {padding: 8px 12px; background: none}
#status {min-height: 0; font-weight: 600}
#status:has(.prose:empty), #estimate:has(.prose:empty) {display: none}
#numbers h3 {margin: 0 0 8px}
#numbers table {width: 100%; font-variant-numeric: tabular-nums}
#numbers th, #numbers td {padding: 6px 8px; border: 1px solid var(--border-color-primary); word-break: normal}
#numbers td:not(:first-child), #numbers th:not(:first-child) {text-align: right}
#numbers td:not(:first-child) {white-space: nowrap}
#numbers th:nth-child(3), #numbers p, #numbers h3 {overflow-wrap: anywhere}
#examples .gallery-item {max-width: 100%; white-space: normal; text-align: left}
#examples .gallery-item * {max-width: none; white-space: normal; overflow-wrap: anywhere}
#files .label-clear-button {display: none}
/* The plots have a light background. Inverting lightness and keeping the hue makes them dark. */
.dark .plot img {filter: invert(0.9) hue-rotate(180deg)}
@media (max-width: 700px) {
  #layout {grid-template: "result" "form" "details" / minmax(0, 1fr)}
  #clips {flex-wrap: nowrap; gap: 6px}
  #clips > * {min-width: 0 !important}
  #numbers th, #numbers td {padding: 4px; font-size: 13px}
}
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
