import numpy as np


class BadImage(Exception):
    pass


class Source:
    def __init__(s, n=40):
        s.n = n
        s.name = "fake"
        s.fingerprint = "x"
        s.labels = np.arange(n) % 4
        s.class_names = list("abcd")

    def __len__(s):
        return s.n

    def image_name(s, i):
        return f"img{i}"

    def array(s, i):
        return np.zeros((64, 64, 3), np.uint8)


def open_source(p, subset=None, split="train"):
    return Source()
