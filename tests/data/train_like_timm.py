"""A training script in the manner of timm's train.py, on a data set's first images or on noise; without timm_ghn."""

import argparse
import json
import os

import torch
from timm import create_model, utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import FakeData

parser = argparse.ArgumentParser(description="A training script of the test suite")
parser.add_argument("--model", default="resnet50")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--dataset")
parser.add_argument("--data-dir")
parser.add_argument("--dataset-download", action="store_true")
parser.add_argument("--num-classes", type=int, default=10)
parser.add_argument("--img-size", type=int, default=32)
parser.add_argument("--crop-pct", type=float)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--epochs", type=int)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--device", default="cpu")
parser.add_argument("--output", default="output/train/RUN")


def main() -> None:
    args = parser.parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(42, args.rank)
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        drop_rate=0.0,
        drop_path_rate=None,
        global_pool=None,
        bn_momentum=None,
        scriptable=False,
        checkpoint_path="",
        **args.model_kwargs,
    )
    config = resolve_data_config(vars(args), model=model)
    model.to(device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, weight_decay=0.0)
    if args.distributed:
        model = DistributedDataParallel(model)
    if args.dataset:
        images = create_dataset(args.dataset, args.data_dir, split="train", download=args.dataset_download)
        images.data = images.data[:16]
    else:
        images = FakeData(16, (3, 40, 40), args.num_classes)
    loader = create_loader(
        images,
        input_size=config["input_size"],
        batch_size=8,
        is_training=True,
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        distributed=args.distributed,
        device=device,
    )
    losses = []
    for images, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if utils.is_primary(args):
        os.makedirs(args.output, exist_ok=True)
        saver = utils.CheckpointSaver(model, optimizer, args=args, checkpoint_dir=args.output, decreasing=True)
        saver.save_checkpoint(0, metric=losses[-1])
        print(json.dumps({"losses": losses, "processes": args.world_size}))
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
