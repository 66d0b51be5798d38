"""Objectives of boosters: the hosts' own objectives are what they are compared with."""

import contextlib
import copy
import doctest
import multiprocessing
import pickle
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax
from threadpoolctl import threadpool_limits

import numbaloss as nl
from numbaloss.boosting import called
from numbaloss.boosting.called import field
from numbaloss.boosting.objective import on_host, together

ROWS, ROUNDS = 600, 8
RNG = np.random.default_rng(5)
# Targets with noise, so that no leaf is pure and no split a tie.
X = RNG.normal(size=(ROWS, 4))
SIGNAL = X[:, 0] + 0.5 * X[:, 1] ** 2 + RNG.normal(size=ROWS)
TARGETS = {
    "squares": SIGNAL,
    "logistic": (SIGNAL > 0.5).astype(float),
    "poisson": RNG.poisson(np.exp(0.3 * SIGNAL)).astype(float),
    "softmax": np.digitize(SIGNAL, [0.0, 1.0]).astype(float),
}
STARTS = {"squares": 0.3, "logistic": 0.1, "poisson": 0.2, "softmax": np.array([0.1, -0.2, 0.3])}
WEIGHTS = {"plain": None, "weighted": RNG.uniform(0.5, 2.0, ROWS)}


@nl.elementwise_loss
def half_squares(input, target):
    d = input - target
    return 0.5 * d * d


@nl.score_loss
def focal(log_prob, rest, class_weight, gamma=2.0):
    return -class_weight * rest**gamma * log_prob


@nl.score_loss
def mixed(log_prob, cross_entropy, logsumexp):
    return cross_entropy * (logsumexp + 0.3 * log_prob) + 0.2 * log_prob * logsumexp


class Tilted(nl.ElementwiseLoss):
    """Quadratic, steeper above: with an option, and a link of its own."""

    slant: float = 3.0
    link = "log"

    def value(input, target, slant):
        d = input - target
        return nl.math.where(d > 0, slant, 1.0) * d * d


tilted = Tilted.function
LOSSES = {
    "squares": half_squares,
    "logistic": nl.binary_cross_entropy_with_logits,
    "poisson": nl.poisson_nll_loss,
    "softmax": nl.cross_entropy,
}
HOSTS = ("xgboost", "lightgbm", "catboost")


@pytest.fixture(autouse=True)
def one_thread():
    """scikit-learn takes its threads from OpenMP; on a busy machine they wait for each other."""
    with threadpool_limits(1, user_api="openmp"):
        yield


def host(name):
    return pytest.importorskip("sklearn" if name == "hist_gradient" else name)


def make(name, *args, **kwargs):
    host(name)
    return getattr(nl.boosting, name)(*args, **kwargs)


cases = pytest.mark.parametrize("weights", WEIGHTS)
kinds = pytest.mark.parametrize("kind", LOSSES)
# Each is compiled: these run always.
FEW = {("squares", w) for w in WEIGHTS} | {("logistic", "weighted"), ("poisson", "plain")}
FEW.add(("softmax", "weighted"))
kinds_and_weights = pytest.mark.parametrize(
    "kind, weights",
    [pytest.param(k, w, marks=[] if (k, w) in FEW else [pytest.mark.sweep]) for k in LOSSES for w in WEIGHTS],
)


# ---- the same trees as the hosts' own objectives ----------------------------------------------------


def splits_of(booster):
    """Each node's feature and threshold, in order; leaves have neither."""
    frame = booster.trees_to_dataframe()
    names = ["Feature", "Split"] if "Feature" in frame else ["split_feature", "threshold"]
    return list(frame[names[0]].fillna("")), frame[names[1]].fillna(0).to_numpy()


def assert_same_trees(ours, theirs, predict, rtol=2e-6):
    (f, s), (g, t) = splits_of(ours), splits_of(theirs)
    assert f == g
    assert len(f) > 3 * ROUNDS  # they have grown
    np.testing.assert_allclose(s, t, rtol=1e-6)
    np.testing.assert_allclose(predict(ours), predict(theirs), rtol=rtol, atol=rtol)


XGBOOST = {
    "squares": ("reg:squarederror", {}, 1.0),
    "logistic": ("binary:logistic", {}, 1.0),
    # Its curvature is exp(score + max_delta_step).
    "poisson": ("count:poisson", {"max_delta_step": 0}, 1.0),
    # Its curvature is 2 p (1 - p): twice the exact one. Without what curvatures are compared with or added to
    # that is half the rate.
    "softmax": ("multi:softprob", {"num_class": 3, "lambda": 0, "min_child_weight": 0}, 0.5),
}


@kinds_and_weights
def test_xgboost_grows_the_trees_of_its_own_objectives(kind, weights):
    xgb = host("xgboost")
    name, more, rate = XGBOOST[kind]

    def data():
        made = xgb.DMatrix(X, label=TARGETS[kind], weight=WEIGHTS[weights])
        start = np.asarray(STARTS[kind], np.float32)
        made.set_base_margin(np.broadcast_to(start, (ROWS, *start.shape)).copy())
        return made

    params = {"nthread": 1, "max_depth": 3, "eta": 0.3, **more}
    theirs = xgb.train({**params, "objective": name}, data(), ROUNDS)
    objective = make("xgboost", LOSSES[kind])
    ours = xgb.train({**params, "eta": 0.3 * rate}, data(), ROUNDS, obj=objective)
    assert_same_trees(ours, theirs, lambda b: b.predict(data(), output_margin=True))
    # What it predicts, by our link.
    np.testing.assert_allclose(
        objective.transform(ours.predict(data(), output_margin=True)), theirs.predict(data()), rtol=1e-5
    )


def test_a_matrix_is_not_copied(rng, monkeypatch):
    """Labels and weights are read where XGBoost has them, and by its getters in other versions of it."""
    xgboost = pytest.importorskip("xgboost")
    x, y, w = rng.normal(size=(50, 2)), rng.normal(size=50).astype(np.float32), np.ones(50, np.float32)
    data = xgboost.DMatrix(x, label=y, weight=w)
    label = field(data, "label")
    np.testing.assert_array_equal(label, y)
    assert field(data, "label").ctypes.data == label.ctypes.data != data.get_label().ctypes.data
    np.testing.assert_array_equal(field(data, "weight"), w)
    assert not field(xgboost.DMatrix(x), "weight").size
    data.set_label(2 * y)
    np.testing.assert_array_equal(field(data, "label"), 2 * y)
    monkeypatch.setattr(called, "lying", lambda: None)  # takes nothing: as if interfaces were others
    monkeypatch.setattr(xgboost.DMatrix, "get_label", lambda self: 3 * y)
    np.testing.assert_array_equal(field(data, "label"), 3 * y)


@pytest.mark.more
def test_class_numbers_that_change_are_seen(rng):
    """They are read in each round, be they in the same memory."""
    raw, y = rng.normal(size=(30, 3)).astype(np.float32), rng.integers(0, 3, 30).astype(np.float32)
    objective = nl.boosting.xgboost(nl.cross_entropy)
    data = SimpleNamespace(get_label=lambda: y, get_weight=lambda: None)
    for _ in range(3):
        wanted = nl.cross_entropy.grad(raw, y.astype(int), reduction="sum")
        np.testing.assert_array_equal(objective(raw, data)[0], wanted)
        np.testing.assert_array_equal(objective(raw, data)[0], wanted)
        y[...] = (y + 1) % 3
    y[4] = 0.5
    with pytest.raises(ValueError, match="class numbers, got 0.5"):
        objective(raw, data)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4", np.int8, np.int16])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("shape", [(5, 2), (700, 5), (37, 200), (9000, 3)])
@pytest.mark.thin(7)
def test_class_numbers_of_any_dtype(shape, step, dtype, rng):
    """Kernels read floats as they lie, and check them before anything is written."""
    raw, y = rng.normal(size=shape).astype(np.float32), rng.integers(0, min(shape[1], 100), shape[0])
    y[1], objective = -100, nl.boosting.xgboost(nl.cross_entropy)
    wanted = nl.cross_entropy.value_grad_hess(raw, y, reduction="sum")[1:]
    given = np.repeat(y, step).astype(dtype)[::step]
    for found, expected in zip(objective.derivatives(raw, given), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)
    if np.dtype(dtype).kind != "f":
        return
    out = np.full_like(raw, 7), np.full_like(raw, 7)
    for bad, error in ((0.5, ValueError), (np.inf, ValueError), (-1, IndexError), (1e18, IndexError)):
        given[-1] = bad
        with pytest.raises(error, match="target"):
            objective.derivatives(raw, given, out=out)
        assert (out[0] == 7).all() and (out[1] == 7).all()


def test_memory_is_taken_again_where_nobody_has_it(rng):
    """What a caller still has, or a view of, stays as it is."""
    objective, y = nl.boosting.xgboost(nl.MSELoss()), np.zeros(1000, np.float32)
    data = SimpleNamespace(get_label=lambda: y, get_weight=lambda: None)
    first, second = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    address = objective(first, data)[0].ctypes.data
    assert objective(second, data)[0].ctypes.data == address
    pair = objective(first, data)
    kept = objective(second, data)[0][::2]
    objective(np.ones(1000, np.float32), data)
    np.testing.assert_array_equal(pair[0], 2 * first)
    np.testing.assert_array_equal(pair[1], 2)
    np.testing.assert_array_equal(kept, 2 * second[::2])
    again = copy.deepcopy(objective)(first, data)
    np.testing.assert_array_equal(again[0], 2 * first)


LIGHTGBM = {
    "squares": ("regression", {}, 1.0),
    "logistic": ("binary", {}, 1.0),
    # Its curvature is exp(score + poisson_max_delta_step), which has to be above 0.
    "poisson": ("poisson", {"poisson_max_delta_step": 1e-9}, 1.0),
    # Its curvature is C / (C - 1) p (1 - p).
    "softmax": ("multiclass", {"num_class": 3}, 2 / 3),
}


@kinds_and_weights
def test_lightgbm_grows_the_trees_of_its_own_objectives(kind, weights):
    lgb = host("lightgbm")
    name, more, rate = LIGHTGBM[kind]
    start = np.tile(STARTS[kind], (ROWS, 1)) if kind == "softmax" else np.full(ROWS, STARTS[kind])
    params = {"num_threads": 1, "num_leaves": 7, "learning_rate": 0.2, "verbose": -1, **more}
    params |= {"min_sum_hessian_in_leaf": 0, "boost_from_average": False, "deterministic": True}

    def train(**own):
        data = lgb.Dataset(X, label=TARGETS[kind], weight=WEIGHTS[weights], init_score=start)
        return lgb.train({**params, **own}, data, ROUNDS)

    theirs = train(objective=name)
    ours = train(objective=make("lightgbm", LOSSES[kind]), learning_rate=0.2 * rate)
    assert_same_trees(ours, theirs, lambda b: b.predict(X, raw_score=True))


CATBOOST = {
    "squares": ("RMSE", "CatBoostRegressor", {}),
    "logistic": ("Logloss", "CatBoostClassifier", {}),
    "softmax": ("MultiClass", "CatBoostClassifier", {"classes_count": 3, "boost_from_average": None}),
}


def catboost_model(kind, **params):
    cb = host("catboost")
    usual = dict(
        iterations=ROUNDS,
        depth=3,
        learning_rate=0.3,
        thread_count=1,
        bootstrap_type="No",
        random_strength=0,
        boosting_type="Plain",
        leaf_estimation_iterations=1,
        leaf_estimation_method="Newton",
        score_function="L2",
        boost_from_average=False,
        verbose=0,
        allow_writing_files=False,
    )
    _, name, more = CATBOOST[kind]
    return getattr(cb, name)(**usual | more | params)


@cases
@pytest.mark.parametrize("kind", CATBOOST)
def test_catboost_grows_the_trees_of_its_own_objectives(kind, weights):
    # A fallback to Python would be a warning, and so an error. Its softmax has the whole Hessian, as ours.
    theirs = catboost_model(kind, loss_function=CATBOOST[kind][0])
    objective = make("catboost", LOSSES[kind])
    ours = catboost_model(kind, loss_function=objective, eval_metric=objective.metric)
    for model in (theirs, ours):
        model.fit(X, TARGETS[kind], sample_weight=WEIGHTS[weights])
    (name, score), (_, own) = next(
        zip(*(m.get_best_score()["learn"].items() for m in (ours, theirs)), strict=True)
    )
    assert name == objective.name
    # CatBoost's logistic metric is of probabilities in float32.
    np.testing.assert_allclose(score, own**2 / 2 if kind == "squares" else own, rtol=1e-3)
    raw = [m.predict(X, prediction_type="RawFormulaVal") for m in (ours, theirs)]
    assert np.ptp(raw[0]) > 1
    np.testing.assert_allclose(*raw, rtol=1e-12, atol=1e-12)


HIST = {
    "squares": ("squared_error", "HistGradientBoostingRegressor"),
    "logistic": ("log_loss", "HistGradientBoostingClassifier"),
    "poisson": ("poisson", "HistGradientBoostingRegressor"),
    "softmax": ("log_loss", "HistGradientBoostingClassifier"),
}


def hist_model(kind, **params):
    host("hist_gradient")
    from sklearn import ensemble

    usual = dict(max_iter=ROUNDS, max_depth=3, learning_rate=0.3, early_stopping=False)
    return getattr(ensemble, HIST[kind][1])(**usual | params)


@kinds_and_weights
@pytest.mark.thin(5)
def test_histograms_grow_the_trees_of_their_own_losses(kind, weights):
    losses = HIST[kind][0], make("hist_gradient", LOSSES[kind])
    theirs, ours = (hist_model(kind, loss=loss) for loss in losses)
    for model in (theirs, ours):
        model.fit(X, TARGETS[kind], sample_weight=WEIGHTS[weights])
    for a, b in zip(ours._predictors, theirs._predictors, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.nodes["feature_idx"].tolist() == y.nodes["feature_idx"].tolist()
            np.testing.assert_array_equal(x.nodes["num_threshold"], y.nodes["num_threshold"])
    np.testing.assert_allclose(ours._raw_predict(X), theirs._raw_predict(X), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=5e-6, atol=5e-6)
    if hasattr(theirs, "predict_proba"):
        np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=5e-6)


@pytest.mark.more
def test_histograms_stop_early_by_our_loss_and_by_our_metric():
    loss = make("hist_gradient", LOSSES["softmax"])
    y = np.array(["low", "mid", "top"])[TARGETS["softmax"].astype(int)]  # the host encodes them
    by_loss, by_metric = (
        hist_model("softmax", loss=loss, early_stopping=True, scoring=s, random_state=0).fit(X, y)
        for s in ("loss", loss.metric)
    )
    np.testing.assert_allclose(by_loss.validation_score_, by_metric.validation_score_, rtol=1e-12)
    held = hist_model("softmax", loss="log_loss", early_stopping=True, scoring="loss", random_state=0).fit(
        X, y
    )
    np.testing.assert_allclose(by_loss.validation_score_, held.validation_score_, rtol=1e-6)


# ---- estimators, custom losses ------------------------------------------------------------------------


@cases
def test_estimators_take_objective_and_metric(weights):
    xgb, lgb = host("xgboost"), host("lightgbm")
    y, w = TARGETS["softmax"], WEIGHTS[weights]
    params = dict(n_estimators=3, max_depth=3, n_jobs=1)
    a = xgb.XGBClassifier(
        objective=make("xgboost", nl.cross_entropy),
        eval_metric=make("xgboost", nl.cross_entropy).metric,
        **params,
    )
    a.fit(
        X,
        y,
        sample_weight=w,
        eval_set=[(X, y)],
        sample_weight_eval_set=None if w is None else [w],
        verbose=False,
    )
    objective = make("lightgbm", nl.cross_entropy)
    b = lgb.LGBMClassifier(objective=objective, verbose=-1, **params)
    b.fit(
        X,
        y,
        sample_weight=w,
        eval_X=(X,),
        eval_y=(y,),
        eval_sample_weight=None if w is None else [w],
        eval_metric=objective.metric,
    )
    seen = a.evals_result()["validation_0"], b.evals_result_["valid_0"]
    for result, raw in zip(
        seen, (a.predict(X, output_margin=True), b.predict(X, raw_score=True)), strict=True
    ):
        terms = -log_softmax(raw, axis=1)[np.arange(ROWS), y.astype(int)]
        np.testing.assert_allclose(result["cross_entropy"][-1], np.average(terms, weights=w), rtol=1e-5)
        assert result["cross_entropy"][-1] < 0.95 * np.log(3)


@pytest.mark.parametrize("name", [*HOSTS, "hist_gradient"])
@pytest.mark.thin(4)
def test_custom_losses_train_better_than_a_constant(name):
    """On held-out rows, in their own terms."""
    first, last = slice(0, 400), slice(400, None)
    for kind, loss, options in (("squares", tilted, {"slant": 4.0}), ("softmax", focal, {"gamma": 1.5})):
        objective, y = make(name, loss, **options), TARGETS[kind]
        start = objective.initial_score(y[first])
        constant = np.broadcast_to(start, (ROWS, *np.shape(start)))
        rounds = 25
        if name == "xgboost":
            xgb = host(name)
            parts = [xgb.DMatrix(X[s], label=y[s], base_margin=constant[s].copy()) for s in (first, last)]
            params = {"nthread": 1, "max_depth": 3, "num_class": 3 if kind == "softmax" else 0, "eta": 0.2}
            raw = xgb.train(params, parts[0], rounds, obj=objective).predict(parts[1], output_margin=True)
        elif name == "lightgbm":
            lgb = host(name)
            data = lgb.Dataset(X[first], label=y[first], init_score=constant[first].copy())
            params = {
                "num_threads": 1,
                "num_leaves": 7,
                "verbose": -1,
                "num_class": 3 if kind == "softmax" else 1,
            }
            raw = lgb.train(params | {"objective": objective}, data, rounds).predict(X[last]) + start
        elif name == "catboost":
            cb = host(name)
            pool = cb.Pool(X[first], y[first], baseline=constant[first].copy())
            params = dict(loss_function=objective, eval_metric=objective.metric, iterations=rounds)
            raw = (
                catboost_model(kind, **params).fit(pool).predict(X[last], prediction_type="RawFormulaVal")
                + start
            )
        else:
            model = hist_model(kind, loss=objective, max_iter=rounds).fit(X[first], y[first])
            raw = model._raw_predict(X[last])
            raw = raw[:, 0] if kind == "squares" else raw
        labels = y[last].astype(int) if kind == "softmax" else y[last]
        reached = loss(np.asarray(raw, float), labels, **options)
        assert reached < 0.9 * loss(constant[last].astype(float), labels, **options)


# ---- gradients and curvatures --------------------------------------------------------------------------


def by_hand(kind, raw, y):
    """Gradient and curvature, by the formulas."""
    if kind == "squares":
        return raw - y, np.ones_like(raw)
    if kind == "logistic":
        return expit(raw) - y, expit(raw) * expit(-raw)
    if kind == "poisson":
        return np.exp(raw) - y, np.exp(raw)
    p = softmax(raw, axis=1)
    return p - np.eye(3)[y.astype(int)], p * (1 - p)


@pytest.mark.parametrize("name", ["xgboost", "lightgbm"])
@kinds
def test_weights_multiply_once_and_buffers_stay(name, kind):
    """In the layout and dtype of each host, which reuses what it hands out."""
    y, w = TARGETS[kind].astype(np.float32), WEIGHTS["weighted"].astype(np.float32)
    shape = (ROWS, 3) if kind == "softmax" else (ROWS,)
    raw = RNG.normal(size=shape)
    raw = raw.astype(np.float32) if name == "xgboost" else np.asfortranarray(raw)
    before = raw.copy()
    raw.flags.writeable = False
    objective = make(name, LOSSES[kind])
    data = SimpleNamespace(get_label=lambda: y, get_weight=lambda: w)
    g, h = objective(raw, data)
    np.testing.assert_array_equal(raw, before)
    expected = by_hand(kind, before.astype(float), TARGETS[kind])
    times = WEIGHTS["weighted"].reshape(-1, *[1] * (raw.ndim - 1))
    for found, wanted in zip((g, h), expected, strict=True):
        assert found.dtype == np.float32 and found.shape == shape
        assert found.flags.c_contiguous if name == "xgboost" else found.flags.f_contiguous
        np.testing.assert_allclose(found, times * wanted, rtol=2e-5, atol=2e-6)
    for again in (
        objective(y, raw, w),
        objective(raw, SimpleNamespace(get_label=lambda: y, get_weight=lambda: w)),
    ):
        np.testing.assert_array_equal(again[0], g)
        np.testing.assert_array_equal(again[1], h)
    none = np.empty(0, np.float32)  # XGBoost's word for no weights
    plain = objective(raw, SimpleNamespace(get_label=lambda: y, get_weight=lambda: none))
    np.testing.assert_array_equal(plain[0], objective(y, raw)[0])
    np.testing.assert_allclose(plain[0], expected[0], rtol=2e-5, atol=2e-6)


def test_several_outputs_have_a_weight_a_row():
    objective, w = make("xgboost", half_squares), WEIGHTS["weighted"].astype(np.float32)
    raw, y = RNG.normal(size=(2, ROWS, 3)).astype(np.float32)
    g, h = objective(y.ravel(), raw, w)
    np.testing.assert_allclose(g, (raw - y) * w[:, None], rtol=1e-6)
    np.testing.assert_allclose(h, np.broadcast_to(w[:, None], h.shape), rtol=1e-6)


def test_sums_of_losses():
    criterion = 0.5 * nl.BCEWithLogitsLoss() + 2.0 * nl.SoftMarginLoss()
    objective = make("xgboost", criterion)
    raw, y = RNG.normal(size=50), RNG.choice([0.0, 1.0], 50)
    wanted = 0.5 * (expit(raw) - y) - 2.0 * y * expit(-raw * y)
    np.testing.assert_allclose(objective(y, raw)[0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(objective))(y, raw)[0], wanted, rtol=1e-5, atol=1e-6)
    found = -make("catboost", criterion).calc_ders_range(raw, y, None)[:, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert objective.link == "logit"
    assert make("xgboost", nl.MSELoss() + nl.SoftMarginLoss()).link == "identity"
    with pytest.raises(ValueError, match="reduction='mean' divides"):
        make("xgboost", nl.MSELoss(reduction="mean") + nl.L1Loss())
    with pytest.raises(TypeError, match="neither a loss of elements"):
        make("xgboost", nl.BCEWithLogitsLoss(pos_weight=np.array(2.0)) + nl.MSELoss())


def test_several_quantiles_of_one_target():
    objective = make("xgboost", nl.quantile_loss, quantiles=np.array([0.25, 0.75]), floor=1.0)
    g, h = objective(np.float32([1.0, -1.0]), np.zeros((2, 2), np.float32), np.float32([1.0, 2.0]))
    np.testing.assert_allclose(g, [[-0.25, -0.75], [1.5, 0.5]])
    np.testing.assert_allclose(h, [[1.0, 1.0], [2.0, 2.0]])


@pytest.mark.parametrize("name", ["xgboost", "lightgbm"])
def test_nothing_is_copied(name):
    n = 200_000
    raw = np.zeros(n, np.float32 if name == "xgboost" else np.float64)
    y, w = np.ones(n, np.float32), np.ones(n, np.float32)
    objective = make(name, half_squares)
    objective(y, raw, w)
    tracemalloc.start()
    try:
        g, h = objective(y, raw, w)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < g.nbytes + h.nbytes + 20_000


def test_histograms_write_where_the_host_says_and_copy_nothing():
    n = 200_000
    loss = make("hist_gradient", half_squares)
    y, raw = np.ones(n), np.zeros((n, 1), order="F")
    g, h = loss.init_gradient_and_hessian(n, dtype=np.float32)
    loss.gradient_hessian(y, raw, gradient_out=g, hessian_out=h)
    g[...] = h[...] = 0
    tracemalloc.start()
    try:
        loss.gradient_hessian(y, raw, gradient_out=g, hessian_out=h)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20_000
    assert (g == -1).all() and (h == 1).all()


def test_no_rows_and_one_row():
    for name in ("xgboost", "lightgbm"):
        one = make(name, half_squares)
        for raw in (np.empty(0), np.empty(0, np.float32)):
            g, h = one(
                raw, SimpleNamespace(get_label=lambda: np.empty(0, np.float32), get_weight=lambda: None)
            )
            assert g.shape == h.shape == (0,) and g.dtype == np.float32
        g, h = one(np.float32([2.0]), np.float32([3.0]), np.float32([0.5]))
        assert (g.tolist(), h.tolist()) == ([0.5], [0.5])
        many = make(name, nl.cross_entropy)
        for raw in (np.empty((0, 3)), np.empty(0)):  # a host may not know how many classes nothing has
            assert many(np.empty(0), raw)[0].shape == raw.shape
        g, h = many(np.float32([2.0]), np.zeros((1, 3), np.float32))
        np.testing.assert_allclose(g, [[1 / 3, 1 / 3, -2 / 3]], rtol=1e-6)
        np.testing.assert_allclose(h, [[2 / 9] * 3], rtol=1e-6)
        assert np.isnan(one.mean(np.empty(0), np.empty(0)))


def test_arrays_come_together_on_a_device(monkeypatch):
    """XGBoost gives raw scores on the host, labels from the GPU. A library of arrays stands in for CuPy."""

    class Array:
        __module__ = "cupyish.core"
        __cuda_array_interface__ = {}

        def __init__(self, array):
            self.array = array

        def get(self):
            return self.array

    library = SimpleNamespace(asarray=lambda a: a if isinstance(a, Array) else Array(a))
    monkeypatch.setitem(sys.modules, "cupyish", library)
    raw, label = np.zeros(3), Array(np.ones(3))
    moved = together(raw, label, None)
    assert isinstance(moved[0], Array) and moved[0].array is raw and moved[1] is label and moved[2] is None
    assert on_host(label) is label.array
    assert together(raw, None)[0] is raw


@pytest.mark.parametrize("name", [*HOSTS, "hist_gradient"])
def test_another_curvature_reaches_the_host(name):
    x, y = np.array([-2.0, 0.3, 1.5]), np.array([0.0, 0.0, 1.0])
    d = abs(x - y)
    for options, wanted in (
        ({"curvature": "majorizer"}, np.minimum(1, 1 / d)),
        ({"floor": 0.25}, np.where(d <= 1, 1.0, 0.25)),
    ):
        objective = make(name, nl.huber_loss, **options)
        if name == "catboost":
            found = -objective.calc_ders_range(x, y, None)[:, 1]
        elif name == "hist_gradient":
            found = objective.gradient_hessian(y, x)[1]
        else:
            found = objective(y, x)[1]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        objective = getattr(objective, "objective", objective)
        assert pickle.loads(pickle.dumps(objective)).how == options


def test_xgboost_grows_the_trees_of_its_own_softmax_by_its_own_curvature():
    """With regularisation, which an exact curvature at half the rate would not withstand."""
    xgb = host("xgboost")
    data = xgb.DMatrix(X, label=TARGETS["softmax"], weight=WEIGHTS["weighted"])
    params = {"nthread": 1, "max_depth": 3, "num_class": 3, "base_score": 0.5}
    theirs = xgb.train({**params, "objective": "multi:softprob"}, data, ROUNDS)
    objective = make("xgboost", nl.cross_entropy, curvature="gershgorin")
    ours = xgb.train(params, data, ROUNDS, obj=objective)
    assert_same_trees(ours, theirs, lambda b: b.predict(data, output_margin=True))


# ---- CatBoost ------------------------------------------------------------------------------------------


def test_catboost_compiles_what_is_given_options():
    objective = make("catboost", nl.huber_loss, delta=0.5)
    assert not hasattr(objective, "no_jit")
    x, t, w = RNG.normal(size=50), RNG.normal(size=50).astype(np.float32), RNG.random(50).astype(np.float32)
    w[:3] = 0
    x[0] = np.nan
    pairs = objective.calc_ders_range(x, t, w)
    d = x - t
    np.testing.assert_allclose(pairs[3:, 0], (-w * np.clip(d, -0.5, 0.5))[3:], rtol=1e-6)
    np.testing.assert_allclose(pairs[3:, 1], (-w * (abs(d) <= 0.5))[3:], rtol=1e-6)
    assert (pairs[:3] == 0).all()
    plain = objective.calc_ders_range(x[3:], t[3:], None)
    np.testing.assert_allclose(plain * w[3:, None], pairs[3:], rtol=1e-12)


SCORES = {
    "focal": (focal, {"gamma": 1.5, "weight": np.array([1.0, 2.0, 0.5])}),
    "all of it": (
        nl.cross_entropy,
        {
            "softcap": 2.0,
            "lse_square_scale": 0.3,
            "label_smoothing": 0.2,
            "weight": np.array([1.0, 2.0, 0.5]),
        },
    ),
    "mixed": (mixed, {"label_smoothing": 0.1}),
}


@pytest.mark.parametrize("name", SCORES)
def test_catboost_rows_have_the_whole_hessian(name):
    """By differences of the kernels' gradient; its diagonal is the kernels' curvature."""
    loss, options = SCORES[name]
    objective = make("catboost", loss, **options)
    x, w = np.array([0.3, -1.1, 0.8]), 0.7
    more = {**options, "reduction": "sum", "sample_weight": np.array([w])}
    for label in range(3):
        y = np.array([label])
        g, h = objective.calc_ders_multi(x, float(label), w)
        _, slope, curve = loss.value_grad_hess(x[None], y, **more)
        np.testing.assert_allclose(g, -slope[0], rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(np.diag(h), -curve[0], rtol=1e-10, atol=1e-13)
        step = 1e-5 * np.eye(3)
        there = [
            loss.grad((x + d)[None], y, **more)[0] - loss.grad((x - d)[None], y, **more)[0] for d in step
        ]
        np.testing.assert_allclose(h, -np.array(there) / 2e-5, rtol=1e-6, atol=1e-9)
    for bad in (3.0, -1.0, 0.5):
        with pytest.raises(IndexError, match="out of range"):
            objective.calc_ders_multi(x, bad, w)
    g, h = objective.calc_ders_multi(x, -100.0, w)
    assert not g.any() and not h.any()


def test_catboost_rows_of_another_curvature_are_diagonal():
    objective = make("catboost", nl.cross_entropy, curvature="gershgorin")
    model = catboost_model("softmax", loss_function=objective, eval_metric=objective.metric, iterations=2)
    model.fit(X[:200], TARGETS["softmax"][:200])
    x = np.array([0.3, -1.1, 0.8])
    p = softmax(x)
    g, h = make("catboost", nl.cross_entropy, curvature="gershgorin").calc_ders_multi(x, 1.0, 0.5)
    np.testing.assert_allclose(g, 0.5 * (np.eye(3)[1] - p), rtol=1e-12)
    np.testing.assert_allclose(h, -np.diag(0.5 * 2 * p * (1 - p)), rtol=1e-12)


def test_catboost_calls_the_kernels_where_it_cannot_compile():
    """An array is no option of a compiled function: there is no warning, and the numbers are the same."""
    labels = TARGETS["logistic"]
    x, w = RNG.normal(size=ROWS), WEIGHTS["weighted"]
    p = expit(x)
    ratio = make("catboost", nl.binary_cross_entropy_with_logits, pos_weight=np.array(2.0))
    assert ratio.no_jit
    times = w * np.where(labels == 1, 2.0, 1.0)
    wanted = np.stack([times * (labels - p), -times * p * (1 - p)], axis=1)
    found = ratio.calc_ders_range(x, labels.astype(np.float32), w)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
    objective = make("catboost", nl.binary_cross_entropy_with_logits, pos_weight=np.array(1.0))
    model = catboost_model("logistic", loss_function=objective, eval_metric=objective.metric).fit(X, labels)
    peer = catboost_model("logistic", loss_function="Logloss").fit(X, labels)
    raw = [m.predict(X, prediction_type="RawFormulaVal") for m in (model, peer)]
    np.testing.assert_allclose(*raw, rtol=1e-10, atol=1e-10)


# ---- the best constant ----------------------------------------------------------------------------------


CONSTANTS = {
    "mse": (nl.mse_loss, {}, SIGNAL),
    "huber": (nl.huber_loss, {"delta": 0.4}, SIGNAL),
    "absolute": (nl.l1_loss, {}, SIGNAL),
    "far": (nl.smooth_l1_loss, {"beta": 2.0}, 1e5 + 300 * SIGNAL),
    "logistic": (nl.binary_cross_entropy_with_logits, {}, TARGETS["logistic"]),
    "poisson": (nl.poisson_nll_loss, {}, 1e4 * TARGETS["poisson"]),
    "rate": (nl.poisson_nll_loss, {"log_input": False}, TARGETS["poisson"]),
    "custom": (tilted, {"slant": 5.0}, SIGNAL),
}


@cases
@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.thin(4)
def test_initial_score_is_the_best_constant(name, weights):
    loss, options, y = CONSTANTS[name]
    w = WEIGHTS[weights]
    more = {} if w is None else {"sample_weight": w}

    def total(c):
        return float(loss(np.full(ROWS, float(c)), y, reduction="sum", **options, **more))

    score = nl.boosting.xgboost(loss, **options).initial_score(y, w)
    bounds = (1e-3, y.max() + 1) if name == "rate" else (min(y.min(), 0) - 1, y.max() + 1)
    if name == "poisson":
        bounds = (0, 20)
    best = minimize_scalar(total, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    assert total(score) <= best.fun + 1e-9 * abs(best.fun)
    exact = {
        "mse": np.average(y, weights=w),
        "logistic": np.log(p := np.average(y, weights=w)) - np.log1p(-p) if name == "logistic" else 0,
        "poisson": np.log(np.average(y, weights=w)) if name == "poisson" else 0,
        "rate": np.average(y, weights=w),
    }
    if name in exact:
        np.testing.assert_allclose(score, exact[name], rtol=1e-7)


@cases
@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
@pytest.mark.more
def test_initial_scores_of_classes(name, weights):
    y, w = TARGETS["softmax"], WEIGHTS[weights]
    loss, options = (
        (focal, {"gamma": 1.5}) if name == "focal" else (nl.cross_entropy, {"label_smoothing": 0.1})
    )
    score = nl.boosting.lightgbm(loss, **options).initial_score(y, w)
    more = {} if w is None else {"sample_weight": w}

    def total(c):
        raw = np.repeat(c[None], ROWS, axis=0)
        return float(loss(raw, y.astype(int), reduction="sum", **options, **more))

    best = minimize(
        total, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 2000}
    )
    assert score.shape == (3,) and abs(score.sum()) < 1e-9
    np.testing.assert_allclose(softmax(score), softmax(best.x), rtol=1e-4)
    assert total(score) <= best.fun * (1 + 1e-12)
    if name == "cross_entropy":
        q = np.bincount(y.astype(int), w) / (ROWS if w is None else w.sum())
        np.testing.assert_allclose(softmax(score), 0.9 * q + 0.1 / 3, rtol=1e-9)


@pytest.mark.more
def test_initial_scores_where_something_is_missing():
    logistic = nl.boosting.xgboost(nl.binary_cross_entropy_with_logits)
    assert 20 < logistic.initial_score(np.ones(10)) < 100
    assert -100 < logistic.initial_score(np.zeros(10)) < -20
    classes = nl.boosting.xgboost(nl.cross_entropy)
    score = classes.initial_score(np.array([0, 0, 2, -100]), classes=4)
    p = softmax(score)
    np.testing.assert_allclose(p[[0, 2]], [2 / 3, 1 / 3], rtol=1e-6)
    assert np.isfinite(score).all() and p[[1, 3]].max() < 1e-6
    with pytest.raises(IndexError, match="holds 2, but there are 2 classes"):
        classes.initial_score(np.array([0, 2]), classes=2)
    with pytest.raises(ValueError, match="needs a row"):
        logistic.initial_score(np.empty(0))
    two = nl.boosting.xgboost(nl.mse_loss).initial_score(np.array([[1.0, 10.0], [3.0, 30.0]]))
    np.testing.assert_allclose(two, [2.0, 20.0])


@pytest.mark.more
def test_initial_scores_of_several_quantiles():
    rng = np.random.default_rng(3)
    y, w, levels = rng.normal(size=301), rng.random(301), np.array([0.1, 0.5, 0.9])
    three = nl.boosting.xgboost(nl.QuantileLoss(quantiles=levels))
    np.testing.assert_allclose(three.initial_score(y), np.quantile(y, levels), rtol=1e-9)
    each = [nl.boosting.xgboost(nl.quantile_loss, quantile=q).initial_score(y, w) for q in (0.1, 0.5, 0.9)]
    np.testing.assert_array_equal(three.initial_score(y, w), each)
    shifted = three.initial_score(np.stack([y, y + 1, y + 2], axis=1))
    np.testing.assert_allclose(shifted, np.quantile(y, levels) + np.arange(3), rtol=1e-9)
    y = (rng.random((500, 2)) < 0.3) * 1.0
    weighed = nl.boosting.xgboost(nl.BCEWithLogitsLoss(pos_weight=np.array([1.0, 2.0])))
    odds = np.array([1, 2]) * y.mean(axis=0) / (1 - y.mean(axis=0))
    np.testing.assert_allclose(weighed.initial_score(y), np.log(odds), rtol=1e-9)


# ---- links, pickling, refusals --------------------------------------------------------------------------


def test_links():
    raw = np.array([-800.0, -40.0, 0.0, 3.0, 800.0])
    for loss, wanted in (
        (nl.mse_loss, raw),
        (nl.binary_cross_entropy_with_logits, expit(raw)),
        (nl.soft_margin_loss, expit(raw)),
        (nl.PoissonNLLLoss(log_input=False), raw),
    ):
        np.testing.assert_allclose(nl.boosting.xgboost(loss).transform(raw), wanted, rtol=1e-14)
    for loss in (nl.poisson_nll_loss, tilted):
        np.testing.assert_allclose(nl.boosting.xgboost(loss).transform(raw[:4]), np.exp(raw[:4]))
    scores = np.array([[1e4, 0.0, -1e4], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(
        nl.boosting.xgboost(focal).transform(scores), softmax(scores, axis=1), rtol=1e-12
    )


@pytest.mark.parametrize("name", [*HOSTS, "hist_gradient"])
@pytest.mark.parametrize("kind", ["squares", "softmax"])
def test_pickles_and_copies(name, kind):
    objective = make(
        name,
        tilted if kind == "squares" else focal,
        floor=None,
        **({"slant": 2.0} if kind == "squares" else {}),
    )
    raw = np.zeros((3, 3)) if kind == "softmax" else np.zeros(3)
    y = np.array([0.0, 1.0, 2.0])
    for other in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert repr(other) == repr(objective) and type(other) is type(objective)
        if name in ("xgboost", "lightgbm"):
            np.testing.assert_array_equal(other(y, raw)[0], objective(y, raw)[0])
            metric = pickle.loads(pickle.dumps(objective.metric))
            assert metric(y, raw) == objective.metric(y, raw)
        elif name == "hist_gradient":
            np.testing.assert_array_equal(
                other.gradient_hessian(y, raw)[1], objective.gradient_hessian(y, raw)[1]
            )
        elif kind == "squares":
            np.testing.assert_array_equal(
                other.calc_ders_range(raw, y, None), objective.calc_ders_range(raw, y, None)
            )
        if name == "catboost":
            metric = pickle.loads(pickle.dumps(objective.metric))
            given = tuple(raw.T) if kind == "softmax" else (raw,)
            error, weight = metric.evaluate(given, y.astype(np.float32), None)
            assert metric.get_final_error(error, weight) == pytest.approx(objective.mean(raw, y))


@pytest.mark.parametrize("name", [*HOSTS, "hist_gradient"])
def test_refusals(name):
    make_it = getattr(nl.boosting, name)
    host(name)
    for loss, options in ((nl.mse_loss, {"reduction": "mean"}), (nl.MSELoss(reduction="mean"), {})):
        with pytest.raises(ValueError, match=f"^{name}: reduction='mean' divides .* sums are taken"):
            make_it(loss, **options)
    set_later = nl.KLDivLoss()
    set_later.reduction = "batchmean"
    with pytest.raises(ValueError, match="reduction='batchmean' divides"):
        make_it(set_later)
    for loss in (nl.MSELoss(), nl.MSELoss(reduction="sum"), nl.mse_loss):
        make_it(loss)
    with pytest.raises(TypeError, match=f"^{name}: loss must be one of numbaloss's, .* got str"):
        make_it("mse")
    with pytest.raises(TypeError, match="got MSELoss"):
        make_it(nl.MSELoss)
    with pytest.raises(
        TypeError, match="TripletMarginLoss.* is neither a loss of elements nor of class scores"
    ):
        make_it(nl.triplet_margin_loss)
    with pytest.raises(TypeError, match="gaussian_nll_loss takes input, target, var"):
        make_it(nl.gaussian_nll_loss)
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\], .*with_logits"):
        make_it(nl.binary_cross_entropy)
    with pytest.raises(TypeError, match="has its options already, got delta"):
        make_it(nl.HuberLoss(), delta=2.0)
    with pytest.raises(ValueError, match="delta must be > 0"):
        make_it(nl.huber_loss, delta=-1.0)
    with pytest.raises(ValueError, match="curvature must be one of 'exact', .* got 'best'"):
        make_it(nl.mse_loss, curvature="best")
    with pytest.raises(ValueError, match="mse_loss: there is no curvature 'gershgorin'"):
        make_it(nl.mse_loss, curvature="gershgorin")
    with pytest.raises(ValueError, match="floor must be"):
        make_it(nl.mse_loss, floor=-1.0)


def test_calls_that_do_not_fit():
    objective = nl.boosting.xgboost(nl.cross_entropy)
    with pytest.raises(ValueError, match=r"raw scores must have shape \(N, C\), got \(3,\); tell xgboost"):
        objective(np.zeros(3), np.zeros(3))
    for bad in (0.5, np.nan):
        with pytest.raises(ValueError, match=f"target must hold class numbers, got {bad}"):
            objective(np.array([0.0, bad]), np.zeros((2, 3)))
    with pytest.raises(IndexError, match="target"):
        objective(np.array([0.0, 3.0]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="target must have input's shape"):
        nl.boosting.xgboost(nl.mse_loss)(np.zeros(3), np.zeros((3, 2)))
    logistic, classes = (make("hist_gradient", LOSSES[k]) for k in ("logistic", "softmax"))
    with pytest.raises(ValueError, match="take a loss of class scores"):
        hist_model("softmax", loss=logistic).fit(X, TARGETS["softmax"])
    with pytest.raises(ValueError, match="take a loss of elements"):
        hist_model("logistic", loss=classes).fit(X, TARGETS["logistic"])


def test_a_criterion_is_taken_as_it_is():
    criterion = nl.HuberLoss(delta=0.5)
    objective = nl.boosting.xgboost(criterion)
    criterion.delta = 5.0
    assert objective.loss.delta == 0.5 and objective.loss.reduction == "sum" and criterion.reduction == "mean"


def test_hosts_are_not_imported_before_they_are_asked_for(python):
    script = """
import sys
import numbaloss as nl
print(any(n.startswith("numbaloss.boosting") for n in sys.modules))
nl.boosting.xgboost(nl.mse_loss), nl.boosting.catboost(nl.mse_loss, curvature="absolute")
print(sorted({"xgboost", "lightgbm", "catboost", "sklearn"} & set(sys.modules)))
"""
    assert python(script) == ["False", "[]"]


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="scalars print differently")
def test_docstring_examples():
    done = doctest.testmod(nl.boosting)
    assert done.attempted and not done.failed


# ---- several workers -----------------------------------------------------------------------------------


def train_on(rows, environment):
    """As a worker of Dask does: raw scores on all rows, and the metric of each round."""
    import xgboost as xgb

    y, result = TARGETS["squares"], {}
    objective = nl.boosting.xgboost(nl.huber_loss, delta=2.0)
    with xgb.collective.CommunicatorContext(**environment) if environment else contextlib.nullcontext():
        data = xgb.DMatrix(X[rows], label=y[rows], weight=WEIGHTS["weighted"][rows])
        model = xgb.train(
            {"nthread": 1, "max_depth": 2, "base_score": 0.0},
            data,
            4,
            obj=objective,
            custom_metric=objective.metric,
            evals=[(data, "own")],
            evals_result=result,
            verbose_eval=False,
        )
    return model.predict(xgb.DMatrix(X), output_margin=True), result["own"]["huber_loss"]


def put(queue, *args):
    queue.put(train_on(*args))


@pytest.mark.sweep
@pytest.mark.parametrize("cut", [200, ROWS], ids=["uneven", "one has no rows"])
def test_workers_of_xgboost_find_the_model_of_all_rows(cut):
    host("xgboost")
    from xgboost.tracker import RabitTracker

    alone = train_on(slice(None), {})
    tracker = RabitTracker(host_ip="127.0.0.1", n_workers=2)
    tracker.start()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    parts = slice(0, cut), slice(cut, ROWS)
    workers = [context.Process(target=put, args=(queue, p, tracker.worker_args())) for p in parts]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    tracker.wait_for()
    for raw, metric in found:
        np.testing.assert_allclose(raw, alone[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(metric, alone[1], rtol=1e-5)


DASK = """
import numpy as np, xgboost as xgb, dask.array as da, numbaloss as nl
from distributed import Client, LocalCluster
from xgboost import dask as dxgb

@nl.elementwise_loss
def cost(prediction, target, low=5.0):
    d = prediction - target
    return d * d if d > 0 else low * d * d

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 4))
    y = X[:, 0] + rng.normal(size=600)
    params = {"max_depth": 2, "tree_method": "hist"}
    objective = nl.boosting.xgboost(cost)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            data = dxgb.DaskDMatrix(client, da.from_array(X, chunks=(250, 4)), da.from_array(y, chunks=250))
            more = dict(num_boost_round=3, obj=objective, custom_metric=objective.metric)
            found = dxgb.train(client, params, data, evals=[(data, "train")], **more)
    alone = xgb.train(params, xgb.DMatrix(X, label=y), 3, obj=objective)
    ours, theirs = (t.predict(xgb.DMatrix(X)) for t in (found["booster"], alone))
    print(np.abs(ours - theirs).max())
    print(found["history"]["train"]["cost"][-1], objective.metric(y, theirs))
"""


@pytest.mark.sweep
def test_dask_s_workers_grow_the_trees_of_one(python):
    """A loss of `__main__` reaches the workers; the metric is of all rows."""
    for module in ("xgboost", "distributed", "pyarrow"):
        pytest.importorskip(module)
    *_, apart, metrics = python(DASK, PYTHONWARNINGS="ignore")
    assert float(apart) < 1e-5
    ours, theirs = map(float, metrics.split())
    assert abs(ours - theirs) < 1e-5 * theirs
