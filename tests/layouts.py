"""Image data sets, written byte by byte as their authors store them."""

import pickle
import random

import numpy as np


def planes(n_images, size, seed=0):
    """Images as the data sets store them: n rows of bytes, all of red, then green, then blue."""
    rng = random.Random(seed)
    return [rng.randbytes(3 * size * size) for _ in range(n_images)]


def interleaved(images, size):
    """What reading them must give, one byte after another."""
    n_pixels = size * size
    return [[image[c * n_pixels + p] for p in range(n_pixels) for c in range(3)] for image in images]


def short(content):
    """The pickle opcode of Python 2's str, by which the official files hold bytes."""
    return b"U" + bytes([len(content)]) + content


def python2_pickle(images):
    """A batch of CIFAR-10's Python version as its authors wrote it: protocol 2, by hand."""
    data = b"".join(images)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    state = b"(K\x01" + b"K" + bytes([len(images)]) + b"M\x00\x0c\x86" + dtype + b"\x89"
    state += b"T" + len(data).to_bytes(4, "little") + data + b"tb"
    labels = short(b"labels") + b"](" + b"K\x07" * len(images) + b"e"
    return b"\x80\x02}(" + labels + short(b"data") + array + state + b"u."


def batches(train, valid):
    return {"data_batch_1": train[:2], "data_batch_2": train[2:], "test_batch": valid}.items()


def write_binary(directory, train, valid):
    directory.mkdir(parents=True)
    for name, images in batches(train, valid):
        (directory / f"{name}.bin").write_bytes(b"".join(b"\x07" + image for image in images))


def write_python2(directory, train, valid):
    directory.mkdir(parents=True)
    for name, images in batches(train, valid):
        (directory / name).write_bytes(python2_pickle(images))


def write_python3(directory, train, valid):
    directory.mkdir(parents=True)
    for name, images in batches(train, valid):
        data = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), -1).copy()
        (directory / name).write_bytes(pickle.dumps({b"labels": [7] * len(images), b"data": data}, protocol=4))


def write_npz(directory, train, valid, shape=(-1,)):
    """Batches 9 and 10: the order of the numbers is not that of the names."""
    directory.mkdir(parents=True)
    for name, images in {"train_data_batch_9": train[:2], "train_data_batch_10": train[2:], "val_data": valid}.items():
        data = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), *shape)
        np.savez(directory / f"{name}.npz", data=data, labels=np.arange(len(images)), mean=np.zeros(3))


def write_channel_last(directory, train, valid):
    """The same pixels, in the order in which they are read."""
    size = round((len(train[0]) / 3) ** 0.5)
    write_npz(directory, *(list(map(bytes, interleaved(part, size))) for part in (train, valid)), (size, size, 3))
