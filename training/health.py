"""Does this run look like it is failing? What the measures of methods/health.py mean, in plain words."""


def diagnose(values: dict[str, float]) -> dict[str, str]:
    """Short name of a problem -> what it means and what has helped, for measures taken after the warm-up."""
    found = {}
    entropy = values.get("entropy_over_ln_k")
    if entropy is not None and entropy > 0.98:
        found["uniform teacher"] = (
            f"the teacher spreads over all prototypes (entropy {entropy:.3f} of ln K): collapse to the uniform "
            "distribution; lower --teacher_temp or lengthen --warmup_teacher_temp_epochs"
        )
    elif values.get("loss_over_ln_k", 0.0) > 0.98:
        found["flat loss"] = (
            f"the loss stays at ln K ({values['loss_over_ln_k']:.3f} of it): the student has learnt nothing yet; "
            "lower the temperature, raise --freeze_last_layer, or try --precision fp32"
        )
    if entropy is not None and entropy < 0.02 and values.get("loss_over_ln_k", 1.0) < 0.02:
        found["one prototype"] = (
            f"the teacher always picks the same prototypes (entropy {entropy:.3f} of ln K, loss near 0): collapse to "
            "one point; check the centre, raise --teacher_temp, lower the learning rate"
        )
    if values.get("effective_rank", 99.0) < 1.5:
        found["flat features"] = (
            f"the features of a batch lie on a line (effective rank {values['effective_rank']:.2f}): dimensional "
            "collapse; lower the learning rate, and look at the crops in TensorBoard"
        )
    return found | _of_frozen_teachers(values) | _of_regions(values) | _of_contrast(values)


def _of_frozen_teachers(values: dict[str, float]) -> dict[str, str]:
    """Of a student of several: what it learns of each, and whether what it is told stands still."""
    found = {}
    for measure, value in values.items():
        kind, _, name = measure.partition("_of_")
        if kind == "relative_loss" and value > 0.98:
            found[f"silence about {name}"] = (
                f"of teacher {name} the student has learnt nothing: its class tokens cost {value:.2f} of what zeros "
                "would; raise --lr or the widths of --lp_args, and look whether its file holds what it should"
            )
        if kind == "hardest" and value > 0.95:
            found[f"one teacher, {name}"] = (
                f"teacher {name} is the hardest for {value:.0%} of the images, and only the others are ever left out; "
                "--t_drop_prob 0 keeps all for every image; look whether its file holds what it should"
            )
    if values.get("statistics_drift", 0.0) > 0.5:
        found["drift"] = (
            f"what teachers are standardised by moves by {values['statistics_drift']:.2f} of a spread in a step, so "
            "that targets do not stand still; take more images per step, or lower --tnorm_ema_momentum_start"
        )
    return found


def _of_regions(values: dict[str, float]) -> dict[str, str]:
    """Of tokens that are compared with each other: whether they differ, within an image and at all."""
    found = {}
    if values.get("region_entropy_over_ln_k", 0.0) > 0.98:
        found["uniform regions"] = (
            f"the teacher's regions spread over all prototypes (entropy {values['region_entropy_over_ln_k']:.3f} of "
            "ln K): lower --teacher_temp, or begin without --use_dense_prediction and continue with it"
        )
    if values.get("matched_share", 1.0) < 1 and values.get("matched_tokens", 99.0) < 1.5:
        found["one region"] = (
            f"regions of a crop find the same {values['matched_tokens']:.1f} of the teacher's view: they do not differ "
            "within an image; look at matches.png of --dry_run, lower the learning rate, or begin without "
            "--use_dense_prediction"
        )
    return found


def _of_contrast(values: dict[str, float]) -> dict[str, str]:
    """Of views among earlier images: whether they are told apart, and whether what is found differs."""
    found = {}
    ranks = {name: values[name] for name in ("instance_rank", "local_group_rank") if name in values}
    if ranks and max(ranks.values()) > 0.4:
        worst = max(ranks, key=ranks.get)
        found["positives among negatives"] = (
            f"{ranks[worst]:.0%} of the queue is nearer to a view than its positive ({worst}; 50 % is chance): the "
            "contrast tells images not apart; lower the learning rate, lengthen --warmup_epochs, or raise --prob"
        )
    if values.get("retrieved_spread", 1.0) < 0.02:
        found["one neighbourhood"] = (
            f"all that the memory returns points one way (spread {values['retrieved_spread']:.3f}): mean tokens have "
            "collapsed; lower the learning rate, or --loss_weights 1 0 1 to see what the other losses do alone"
        )
    return found
