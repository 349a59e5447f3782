"""A validation script in the manner of timm's validate.py. It knows nothing of timm_ghn."""

import argparse

import torch
from timm import create_model, utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint

parser = argparse.ArgumentParser(description="A validation script of the test suite")
parser.add_argument("--model", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--num-classes", type=int)
parser.add_argument("--dataset", required=True)
parser.add_argument("--data-dir", required=True)
parser.add_argument("--img-size", type=int)
parser.add_argument("--crop-pct", type=float)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--device", default="cpu")


def main() -> None:
    args = parser.parse_args()
    model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    load_checkpoint(model, args.checkpoint)
    config = resolve_data_config(vars(args), model=model)
    loader = create_loader(
        create_dataset(args.dataset, args.data_dir, split="validation"),
        input_size=config["input_size"],
        batch_size=100,
        crop_pct=config["crop_pct"],
        num_workers=0,
        device=torch.device(args.device),
    )
    right = total = 0
    with torch.no_grad():
        for images, labels in loader:
            right += int((model.eval()(images).argmax(1) == labels).sum())
            total += len(labels)
    print(f"{right} of {total}")


if __name__ == "__main__":
    main()
