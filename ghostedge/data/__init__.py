"""Where images come from: folders, torchvision's CIFAR sets, and drawn figures for tests."""
