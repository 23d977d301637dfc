def extract_features(*a, **k):
    raise SystemError
