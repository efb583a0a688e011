"""What a move of a hand costs in the page: drawing, and from one frame to the next. `python tests/bench_widgets.py`

Headless chromium, wall time, medians of the frames; the machine should be quiet.
"""
import argparse
import statistics
import tempfile
from pathlib import Path

from acl_nb.plots.live import live_page, live_side
from benching import Rows, out_option, processor_name
from browsers import browser

SECTION = "explorers in a page, headless chromium"
SIDES = [live_side("SCL"), live_side("ACL")]
LARGE = {"loss": SIDES, "views": 4, "images": 256, "classes": 100}

# In each frame a hand moves a point, or a slider takes its next value; then the next frame is awaited.
MOVE = """async ([kind, frames]) => {
  const explorer = document.querySelector(".acl-live").explorer, panel = explorer.panels[0].svg;
  const draw = explorer.draw.bind(explorer), drawing = [], gaps = [];
  explorer.draw = () => { const start = performance.now(); draw(); drawing.push(performance.now() - start); };
  const frame = () => new Promise(requestAnimationFrame);
  const box = panel.getBoundingClientRect(), at = (n) => ({
    bubbles: true, clientX: box.left + box.width * (.5 + .33 * Math.cos(n / 20)),
    clientY: box.top + box.height * (.5 + .33 * Math.sin(n / 20))});
  if (kind === "drag") panel.querySelector(".point").dispatchEvent(new PointerEvent("pointerdown", at(0)));
  const bar = explorer.el.querySelectorAll("input[type=range]");
  const slider = [...bar].find((b) => b.parentElement.textContent.startsWith(kind));
  let last = await frame();
  for (let n = 0; n < frames; n++) {
    if (kind === "drag") dispatchEvent(new PointerEvent("pointermove", at(n)));
    else { slider.value = n % (Number(slider.max) + 1); slider.dispatchEvent(new Event("input")); }
    const now = await frame();
    if (n > 3) gaps.push(now - last);
    last = now;
  }
  return {drawing: drawing.slice(3), gaps};
}"""

def many_points(n):
    "A state of n points: images of two views, four classes around the circle."
    start = {"loss": SIDES, "views": 2, "temperature": 0.3, "dim": 2, "chosen": 0, "steps": 0}
    if n == 8: return start | {"start": "one anchor"}
    from math import cos, sin
    angles = [0.0314 * i for i in range(n)]
    z = [v for a in angles for v in (cos(a), sin(a))]
    return start | {"labels": [4 * i // n for i in range(n)], "image": [i // 2 for i in range(n)], "z": [z, z]}

CASES = {
    "drag one of 8 points": ("conflict", many_points(8), "drag", 33),
    "drag one of 200 points": ("conflict", many_points(200), "drag", 33),
    "temperature, 64 × 2 views, 50 classes": ("balance", {"loss": SIDES}, "temperature", 150),
    "temperature, 256 × 4 views, 100 classes": ("balance", LARGE, "temperature", 150),
    "seed (a new batch), 256 × 4 views, 100 classes": ("balance", LARGE, "seed", 150),
}

def measure(chromium, folder, kind, state, move, frames):
    "Medians of drawing and of a frame, in milliseconds."
    path = Path(folder)/"page.html"
    path.write_text(f'<!doctype html><meta charset="utf-8">{live_page(kind, state)}', encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(path.as_uri())
    page.wait_for_selector(".acl-live svg")
    found = page.evaluate(MOVE, [move, frames])
    page.close()
    return statistics.median(found["drawing"]), statistics.median(found["gaps"])

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--frames", type=int, default=120, help="how often each control is moved")
    out_option(ask, "widgets")
    args = ask.parse_args()
    rows = Rows(args.out, processor_name())
    rows.begin(SECTION)
    print(f"{'move':50} {'draw ms':>9} {'frame ms':>9}")
    with browser() as chromium, tempfile.TemporaryDirectory() as folder:
        for case, (kind, state, move, goal) in CASES.items():
            drawing, frame = measure(chromium, folder, kind, state, move, args.frames)
            rows.add(SECTION, case, "draw", drawing, "ms")
            rows.add(SECTION, case, "frame", frame, "ms")
            rows.add(SECTION, case, "time ratio", frame / goal, "×", f"goal of {goal} ms")
            print(f"{case:50} {drawing:9.1f} {frame:9.1f}", flush=True)
    rows.write()

if __name__ == "__main__": main()
