"""Where images come from: folders, torchvision's sets, and drawn figures for tests."""
