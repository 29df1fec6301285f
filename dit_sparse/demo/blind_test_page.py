"""Gradio page of the blind test: two clips side by side, and a vote."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from html import escape
from urllib.parse import quote

import gradio as gr

from ..eval.preference.votes import MAX_RATER
from .blind_test import BlindTest, View, rater_name
from .blind_test_styles import CSS, KEEP_NAME, READ_NAME, SCRIPT, VOTE
from .request_filter import LOCAL_HOSTS, check_address, launch_filtered

INTRODUCTION = """# Which clip looks better?
Two clips of the same prompt and seed, in random order. Vote for the one that looks better: fewer artefacts, a closer
match to the prompt, smoother motion. <span class="keys">Keys: ← left, → right, ↓ or T no difference, space plays both
again.</span>"""
DONE = "<p class='prompt'>You have compared all pairs. Thank you.</p>"
EXPIRED = "<p class='prompt'>This pair has expired. Reload the page to continue.</p>"
BUTTONS = {"left": "← Left", "tie": "No difference", "right": "Right →"}


class BlindTestPage:
    """The page of a blind test. A vote carries the random token of the pair that the rater saw."""

    def __init__(self, test: BlindTest) -> None:
        self.test = test

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="Which clip looks better?") as blocks:
            gr.Markdown(INTRODUCTION)
            token = gr.Textbox(visible=False)
            with gr.Column(elem_id="start") as start_panel:
                name = gr.Textbox(
                    label="Your name or initials",
                    info="Optional. To continue later on another device, use the same name.",
                    max_length=MAX_RATER,
                )
                start = gr.Button("Start", variant="primary")
            with gr.Column(visible=False) as vote_panel:
                pair = gr.HTML(elem_id="pair", min_height=120)
                with gr.Row(elem_id="votes") as votes:
                    buttons = {
                        choice: gr.Button(text, elem_id=f"vote-{choice}", min_width=80)
                        for choice, text in BUTTONS.items()
                    }
                status = gr.HTML(elem_id="status")
            at_once = {"queue": False, "show_progress": "hidden"}
            shown = [pair, votes, status]
            blocks.load(None, None, name, js=READ_NAME)
            gr.on(
                [start.click, name.submit],
                self._start,
                name,
                [start_panel, vote_panel, *shown],
                js=KEEP_NAME,
                **at_once,
            )
            for choice, button in buttons.items():
                vote = partial(self._vote, choice)
                button.click(vote, token, shown, js=VOTE, trigger_mode="multiple", **at_once)
        return blocks

    def _start(self, name: str) -> list:
        return [gr.update(visible=False), gr.update(visible=True), *self._next(rater_name(name))]

    def _vote(self, choice: str, token: str) -> list:
        if not token:  # the clips have not begun yet
            return [gr.skip() for _ in range(3)]
        rater = self.test.vote(token, choice)
        return [EXPIRED, gr.update(visible=False), ""] if rater is None else self._next(rater)

    def _next(self, rater: str) -> list:
        """Return the contents of the pair, the row of buttons and the status."""
        view = self.test.show(rater)
        done, total = self.test.progress(rater)
        status = f"{done} of {total} pairs, as {escape(rater)}"
        return [DONE if view is None else pair_html(view), gr.update(visible=view is not None), status]


def pair_html(view: View) -> str:
    """Return the HTML of a pair. The addresses contain random names only."""
    figure = lambda path, side: (
        f'<figure><video src="gradio_api/file={quote(path.as_posix())}" autoplay muted playsinline preload="auto" '
        f'disablepictureinpicture aria-label="{side} clip"></video><figcaption>{side}</figcaption></figure>'
    )
    clips = figure(view.left, "Left") + figure(view.right, "Right")
    prompt = f'<p class="prompt">“{escape(view.prompt)}”</p>'
    return f'<div data-view="{view.token}">{prompt}<div class="clips">{clips}</div></div>'


def launch(test: BlindTest, host: str, port: int, allowed_hosts: Collection[str] = (), **settings) -> gr.Blocks:
    """Start the page and return its blocks. It is open to the names of this machine and ``allowed_hosts``.

    Raises:
        ValueError: the page cannot listen on the address.
    """
    check_address(host, port)
    blocks = BlindTestPage(test).build()
    launch_filtered(
        blocks,
        CSS,
        SCRIPT,
        test.folder,
        local=host in LOCAL_HOSTS,
        hosts=allowed_hosts,
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        footer_links=[],
        prevent_thread_lock=True,
        **settings,
    )
    return blocks
