"""What the 1000 classes of ImageNet-1k, in the order of their WordNet ids, are called in data sets made from them."""

import torch

# ImageNet-9 (Xiao et al., 2006.09994). As published: two breeds of dogs (171, 172) and domestic cats are in no class.
IMAGENET_9 = {
    "dog": "151-170 173-268",
    "bird": "7-24 87-100 127-146",
    "wheeled vehicle": "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 "
    "670-671 675 690 705 717 734 751 757 791 802-803 817 820 829 847 864 866-867 870 880",
    "reptile": "33-68",
    "carnivore": "269-280 286-299 356-362 387-388",
    "insect": "300-326",
    "musical instrument": "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 822 "
    "875 881 889",
    "primate": "365-384",
    "fish": "0-6 389-397",
}
# ImageNet-A (Hendrycks et al., 1907.07174)
IMAGENET_A = (
    "6 11 13 15 17 22-23 27 30 37 39 42 47 50 57 70-71 76 79 89-90 94 96-97 99 105 107-108 110 113 124-125 130 "
    "132 143-144 150-151 207 234-235 254 277 283 287 291 295 298 301 306-311 313-315 317 319 323-324 326-327 "
    "330 334-336 347 361 363 372 378 386 397 400-402 404 407 411 416-417 420 425 428 430 437-438 445 456-457 "
    "461-462 470 472 483 486 488 492 496 514 516 528 530 539 542-543 549 552 557 561-562 569 572-573 575 579 "
    "589 606-607 609 614 626-627 640-643 658 668 677 682 684 687 701 704 719 736 746 749 752 758 763 765 768 "
    "773-774 776 779-780 786 792 797 802-804 813 815 820 823 831 833 835 839 845 847 850 859 862 870 879-880 "
    "888 890 897 900 907 913 924 932-934 937 943 945 947 951 954 956-957 959 971-972 980-981 984 986-988"
)
# ImageNet-C (Hendrycks and Dietterich, 1903.12261), and AlexNet's mean errors, which an mCE is relative to
CORRUPTIONS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
FURTHER_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)


def numbers(ranges: str) -> list[int]:
    """ "3 5-7" -> [3, 5, 6, 7]."""
    ends = [[int(end) for end in part.split("-")] for part in ranges.split()]
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


def imagenet_9(classes: int = 1000) -> torch.Tensor:
    """(classes,): the class in ImageNet-9 of every ImageNet class, -1 where it has none."""
    mapped = torch.full((classes,), -1)
    for number, ranges in enumerate(IMAGENET_9.values()):
        mapped[numbers(ranges)] = number
    return mapped
