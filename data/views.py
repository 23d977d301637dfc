class MultiCropViews:  # stub until the data room lands
    def __init__(self, **kwargs):
        self.__dict__.update(kwargs)
