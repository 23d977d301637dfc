def knn_classify(*a, **k):
    raise SystemError
