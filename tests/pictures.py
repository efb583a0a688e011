"A small folder of pictures with a long tail, and a recipe for it, for tests that need files and processes that load them."
import json

import numpy as np
from PIL import Image

RECIPE = dict(dataset="folder_lt", imbalance="as_is", size=8, encoder="resnet8_tiny", policy="plain", batch_size=16, views=2,
              dim=8, hidden=8, lr=0.05)

def folder(root, times=1):
    "Four classes of pictures of 12 × 10 pixels, or so many times as large: 60, 40, 20 and 10."
    rng = np.random.default_rng(0)
    for label, n in enumerate((60, 40, 20, 10)):
        (root/f"class {label}").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 90, (10, 12, 3)) + 40 * label
            picture = Image.fromarray(pixels.astype(np.uint8)).resize((12 * times, 10 * times), Image.NEAREST)
            picture.save(root/f"class {label}"/(f"{i}.png" if times == 1 else f"{i}.jpg"))
    return root

def recipe_file(path, data, **more):
    path.write_text(json.dumps(RECIPE | dict(name="mine", data=str(data)) | more))
    return path
