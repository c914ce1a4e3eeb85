"""From files of images to pixels: folders, the archives of CIFAR."""
