

def attention_maps(b, x):
    return b.get_last_selfattention(x, 1)[:, :, 0, 1:]


def attention_sheet(p, m):
    return p
