"""Parity with packages that others keep (`pip install tfbench[peers]`); a test is skipped where
its package is missing.
"""

import random
import warnings

import numpy as np
import pytest
import torch


def test_maze_dataset_makes_the_mazes_that_we_read():
    """Mazes, solutions and tokens of maze-dataset, read by our tokenizer and checked by our path
    checker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("maze_dataset")
        from maze_dataset import SolvedMaze
        from maze_dataset.generation import LatticeMazeGenerators
        from maze_dataset.tokenization import MazeTokenizer as TheirTokenizer
        from maze_dataset.tokenization import TokenizationMode
    from tfbench.data.mazes import Maze, MazeTokenizer, shortest_path

    ours, theirs = (
        MazeTokenizer(5),
        TheirTokenizer(tokenization_mode=TokenizationMode.AOTP_UT_rasterized, max_grid_size=5),
    )
    for seed in range(20):
        np.random.seed(seed)
        random.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lattice = LatticeMazeGenerators.gen_dfs(np.array([5, 5]), do_forks=True)
            solved = SolvedMaze.from_lattice_maze(
                lattice, lattice.find_shortest_path((0, seed % 5), (4, 4))
            )
            words = [w for w in solved.as_tokens(theirs) if w != "<-->"]
        maze = Maze(torch.from_numpy(lattice.connection_list))
        assert len(maze.edges) == 24
        read, origin, target, path = ours.parse([ours.ids[w] for w in words])
        assert torch.equal(read.open, maze.open) and (origin, target) == ((0, seed % 5), (4, 4))
        assert (
            path
            == shortest_path(maze, origin, target)
            == [tuple(map(int, c)) for c in solved.solution]
        )
        mine = ours.decode(ours.encode(maze, origin, target))
        assert mine[mine.index("<ADJLIST_END>") :] == words[
            words.index("<ADJLIST_END>") :
        ] and sorted(mine) == sorted(words)


def test_torchconvquality_measures_the_same():
    "All measures of a layer, on random, sparse and depthwise layers."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("torchconvquality")
    from tfbench.analysis.filter_db import layer_quality

    generator = torch.Generator().manual_seed(0)
    layers = [
        torch.randn(*shape, 3, 3, generator=generator) for shape in ((8, 3), (16, 1), (32, 64))
    ]
    layers[2][:10] *= 1e-3
    for w in layers:
        expected, ours = theirs.measure_conv_weight_quality(w), layer_quality(w)
        assert set(expected) == set(ours)
        for name, value in expected.items():
            assert abs(value - ours[name]) < 1e-6, name


def _published_ttm():
    """The modeling and configuration modules of granite-tsfm, without its toolkit, which asks
    for packages that a model does not need."""
    import importlib
    import importlib.metadata
    import sys
    import types

    try:
        files = importlib.metadata.files("granite-tsfm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            "granite-tsfm is not installed (pip install --no-deps -r requirements-peers.txt)"
        )
    folder = (
        next(f for f in files if str(f).endswith("models/tinytimemixer/__init__.py"))
        .locate()
        .parent
    )
    for name, path in (
        ("tsfm_public", folder.parents[1]),
        ("tsfm_public.models", folder.parent),
        ("tsfm_public.models.tinytimemixer", folder),
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return [
        importlib.import_module(f"tsfm_public.models.tinytimemixer.{kind}_tinytimemixer")
        for kind in ("modeling", "configuration")
    ]


def test_granite_tsfm_makes_the_same_forecasts(monkeypatch):
    """TinyTimeMixerForPrediction and our TTM with its weights: forecast and loss, all
    combinations of prefix, levels, channel mixing and known future."""
    import dataclasses
    import itertools
    import sys

    from tfbench.modalities.tiny_time_mixers import TTM, TTMConfig, from_published

    for name in [n for n in sys.modules if n.split(".")[0] == "tsfm_public"]:
        monkeypatch.delitem(sys.modules, name)
    modeling, configuration = _published_ttm()
    x, y = (
        3 * torch.randn(4, 96, 3, dtype=torch.float64) + 2,
        torch.randn(4, 24, 3, dtype=torch.float64),
    )
    token, observed = torch.tensor([0, 3, 6, 7]), torch.rand(4, 96, 3) > 0.1
    mean = (x * observed).sum(1, keepdim=True) / observed.sum(1, keepdim=True)
    mixing = (
        {},
        {"enable_forecast_channel_mixing": True},
        {
            "enable_forecast_channel_mixing": True,
            "fcm_context_length": 2,
            "prediction_channel_indices": [0, 1],
            "exogenous_channel_indices": [2],
        },
    )
    for prefix, levels, mode, fcm, seen in itertools.product(
        (False, True), (0, 3), ("common_channel", "mix_channel"), mixing, (None, observed)
    ):
        config = TTMConfig(
            context_length=96,
            prediction_length=24,
            patch_length=8,
            num_input_channels=3,
            d_model=24,
            decoder_d_model=16,
            mode=mode,
            decoder_mode=mode,
            adaptive_patching_levels=levels,
            resolution_prefix_tuning=prefix,
            **fcm,
        )
        words = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        torch.manual_seed(0)
        theirs = (
            modeling.TinyTimeMixerForPrediction(
                configuration.TinyTimeMixerConfig(patch_stride=8, scaling="std", **words)
            )
            .double()
            .eval()
        )
        ours = from_published(theirs.state_dict(), config).double().eval()
        read = x if seen is None else torch.where(seen, x, mean)  # theirs reads what is hidden
        expected = theirs(
            read, future_values=y, past_observed_mask=seen, freq_token=token if prefix else None
        )
        found = ours(x, y, token if prefix else None, seen)
        torch.testing.assert_close(found.forecast, expected.prediction_outputs, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-6)
    whole = modeling.TinyTimeMixerForPrediction(
        configuration.TinyTimeMixerConfig(
            context_length=512,
            prediction_length=96,
            patch_length=64,
            patch_stride=64,
            d_model=192,
            num_layers=2,
            adaptive_patching_levels=3,
            decoder_num_layers=2,
            decoder_d_model=128,
            frequency_token_vocab_size=10,
        )
    )
    assert (
        sum(p.numel() for p in whole.parameters())
        == sum(p.numel() for p in TTM(TTMConfig()).parameters())
        == 805_280
    )


def test_linformer_gives_the_same():
    "Attention with projected keys and values, also for sequences shorter than the longest."
    theirs = pytest.importorskip("linformer").LinformerSelfAttention(12, 20, k=5, heads=3)
    from tfbench.nn.attention import merge_heads, split_heads
    from tfbench.surveys.faster_atlas import attention

    ours, generator = attention("linformer", 3, 4, 20, k=5), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, other in ((ours.E, theirs.proj_k), (ours.F, theirs.proj_v)):
            mine.copy_(other.T)
        for n in (20, 13):
            x = torch.randn(2, n, 12, generator=generator)
            q, k, v = (
                split_heads(project(x), 3) for project in (theirs.to_q, theirs.to_k, theirs.to_v)
            )
            torch.testing.assert_close(
                theirs.to_out(merge_heads(ours(q, k, v))), theirs(x), atol=1e-6, rtol=0
            )


def test_nystrom_attention_gives_the_same():
    """Landmarks, Newton's pseudoinverse and the convolution over values; one head, as the
    package scales its first guess over all heads."""
    theirs = pytest.importorskip("nystrom_attention").NystromAttention(
        8, dim_head=8, heads=1, num_landmarks=4, residual_conv_kernel=5
    )
    from tfbench.nn.attention import merge_heads, split_heads
    from tfbench.surveys.faster_atlas import attention

    ours = attention("nystrom", 1, 8, 16, m=4, kernel=5)
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.skip.weight.copy_(theirs.res_conv.weight)
        q, k, v = (split_heads(t, 1) for t in theirs.to_qkv(x).chunk(3, -1))
        torch.testing.assert_close(
            theirs.to_out(merge_heads(ours(q, k, v))), theirs(x), atol=1e-6, rtol=0
        )


def test_local_attention_gives_the_same():
    "The last w keys and the own one, also where the sequence does not fill its last block."
    theirs = pytest.importorskip("local_attention").LocalAttention(
        window_size=8,
        causal=True,
        look_backward=1,
        look_forward=0,
        dim=6,
        autopad=True,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    from tfbench.surveys.faster_atlas import attention

    ours, generator = attention("local", 3, 6, 64, w=8), torch.Generator().manual_seed(0)
    for n in (8, 32, 43):
        q, k, v = torch.randn(3, 2, 3, n, 6, generator=generator)
        torch.testing.assert_close(ours(q, k, v, causal=True), theirs(q, k, v), atol=1e-6, rtol=0)


def test_performer_gives_the_same():
    """Positive features with the package's own directions, without the constant that it adds to
    every feature; one head, as it has one set for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("performer_pytorch.performer_pytorch")
    from tfbench.surveys.faster_atlas import attention

    torch.manual_seed(0)
    directions = theirs.gaussian_orthogonal_random_matrix(12, 6)
    ours = attention("performer", 1, 6, 40, m=12)
    with torch.no_grad():
        ours.w.copy_(directions[None])
    q, k, v = torch.randn(3, 2, 1, 40, 6)
    features = [
        theirs.softmax_kernel(x, projection_matrix=directions, is_query=query, eps=0.0)
        for x, query in ((q, True), (k, False))
    ]
    torch.testing.assert_close(
        ours(q, k, v), theirs.linear_attention(*features, v), atol=1e-6, rtol=0
    )
