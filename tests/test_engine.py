"""Training trains, evaluation is exact, and an interrupted training ends on the same bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import engine
import models
import pruning
import store
import utils


def dataset(train: int = 40, test: int = 23, size: int = 16) -> data.Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(images: int) -> data.Split:
        labels = torch.randint(2, (images,), generator=generator)
        noise = torch.randint(0, 120, (images, size, size, 3), generator=generator)
        return data.Split((noise + 120 * labels[:, None, None, None]).to(torch.uint8), labels)

    return data.Dataset("made", "", ["dark", "light"], split(train), split(test))


CPU = torch.device("cpu")


def fit(network: nn.Module, epochs: int = 2, seed: int = 0, **more) -> list[dict]:
    batches = data.TrainBatches(dataset(), 16, seed, CPU)
    return engine.fit(network, batches, stage="test", epochs=epochs, lr=0.05, **more)


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet20", 2).to(memory_format=torch.channels_last)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("average", [0, 0.5])
def test_retraining_moves_the_survivors_and_leaves_the_pruned_at_zero(average):
    network = fresh()
    fit(network)
    masks = pruning.choose(network, 200_000)
    pruning.apply(network, masks)
    before = store.plain_state(network)
    fit(network, after_step=pruning.keeper(network, masks), average=average)
    for name, weight in pruning.prunable(network).items():
        assert (weight[~masks[name]] == 0).all()
        survivors = masks[name]
        moved = (weight.detach() != before[name])[survivors].float().mean()
        assert moved > 0.99, f"{name}: {moved:.2%} of the surviving weights moved"


def test_the_loss_falls_and_the_learning_rate_goes_to_zero():
    history = fit(fresh(), epochs=6)
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[2]["lr"] == pytest.approx(0.025)
    assert history[-1]["lr"] == 0


def test_the_linear_schedule_warms_up_and_ends_at_zero():
    history = fit(fresh(), epochs=10, schedule=engine.linear)
    rates = [entry["lr"] / 0.05 for entry in history]
    assert rates == pytest.approx([1, *(n / 9 for n in range(8, -1, -1))])
    assert engine.linear(0.05, 0) == pytest.approx(0.005)  # not 0, which would make the first step none


def test_a_teacher_is_asked_and_left_alone():
    """One step, against one written without the engine: the loss of Hinton et al., with a share for each image."""
    teacher, ours, plain = fresh(), fresh(), fresh()
    fit(teacher, epochs=4)
    before = store.plain_state(teacher.eval())
    batches = data.TrainBatches(dataset(train=16), 16, 0, CPU)
    engine.fit(ours, batches, stage="test", epochs=1, lr=0.05, teacher=teacher, nesterov=True)
    assert all(torch.equal(value, before[name]) for name, value in store.plain_state(teacher).items())
    assert not teacher.training
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    [(inputs, labels)] = batches.epoch("test", 0)
    logits = plain(inputs)
    with torch.no_grad():
        wanted = teacher(inputs)
    soft = (wanted / 4).softmax(1)
    divergence = (soft * (soft.log() - (logits / 4).log_softmax(1))).sum(1)
    share = 0.9 * wanted.softmax(1)[torch.arange(16), labels] ** 4
    (share * 16 * divergence + (1 - share) * F.cross_entropy(logits, labels, reduction="none")).mean().backward()
    optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_a_teacher_counts_by_how_sure_it_is_of_the_label():
    logits, labels = torch.tensor([[1.0, 0.5, -1.0]] * 3), torch.tensor([0, 0, 0])
    hard = F.cross_entropy(logits[:1], labels[:1])
    wanted = torch.tensor([[40.0, 0, 0], [0, 40.0, 0], [1.0, 1.0, -40.0]])  # sure and right, sure and wrong, in doubt
    p, q = ((each / 4).softmax(1) for each in (wanted, logits))
    soft = 16 * (p * (p.log() - q.log())).sum(1)
    for image, share in enumerate((0.9, 0.0, 0.9 / 2**4)):
        found = engine.distillation(*(tensor[image : image + 1] for tensor in (logits, wanted, labels)))
        torch.testing.assert_close(found, share * soft[image] + (1 - share) * hard)
    shares = torch.tensor([0.9, 0.0, 0.9 / 2**4])
    together = (shares * soft + (1 - shares) * hard).mean()
    torch.testing.assert_close(engine.distillation(logits, wanted, labels), together)


def test_training_is_plain_sgd_on_the_batches():
    """Against a loop written without the engine: same losses and weights."""
    ours, plain = fresh(), fresh()
    fit(ours)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    batches = data.TrainBatches(dataset(), 16, 0, CPU)
    for epoch in range(2):
        for inputs, labels in batches.epoch("test", epoch):
            optimizer.zero_grad()
            F.cross_entropy(plain(inputs), labels).backward()
            optimizer.step()
            schedule.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_training_can_end_on_averaged_weights_with_statistics_of_their_own():
    """Nine steps on 16, 16 and 8 images thrice: the mean of the first four, then a quarter of each after. BatchNorm is
    that of two more batches of 16."""
    network, seen = fresh(), []
    history = fit(
        network,
        epochs=3,
        average=4 / 9,
        after_step=lambda: seen.append([weight.detach().clone() for weight in network.parameters()]),
    )
    assert history == fit(fresh(), epochs=3)
    assert len(seen) == 9
    for index, found in enumerate(network.parameters()):
        expected = sum(weights[index] for weights in seen[:4]) / 4
        for weights in seen[4:]:
            expected = 0.75 * expected + 0.25 * weights[index]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    batches = [inputs for inputs, _ in data.TrainBatches(dataset(), 16, 0, CPU).epoch("test", 3)][:2]
    maps = [network.conv1(inputs) for inputs in batches]
    for measure, found in (torch.mean, network.bn1.running_mean), (torch.var, network.bn1.running_var):
        expected = sum(measure(each, dim=(0, 2, 3)) for each in maps) / 2
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert network.bn1.momentum == 0.1


def test_the_seed_decides_every_bit():
    networks = [fresh() for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1)):
        fit(network, seed=seed)
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


@pytest.mark.parametrize("images", [1, 7, 8, 65])
def test_evaluation_is_exact_at_any_size(images):
    network = fresh()
    fit(network)
    batches = data.TestBatches(dataset(test=images), CPU)
    batches.batch_size = 8
    score = engine.evaluate(network, batches)
    network.eval()
    correct, loss = 0, 0.0
    for index in range(images):  # one image at a time
        inputs = ((batches.images[index] / 255 - batches.mean) / batches.std).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = network(inputs)
        label = batches.labels[index : index + 1]
        correct += int(logits.argmax(1) == label)
        loss += float(F.cross_entropy(logits, label))
    assert (score.correct, score.images) == (correct, images)
    assert score.accuracy == 100 * correct / images
    assert score.loss == pytest.approx(loss / images, rel=1e-4)


def test_evaluation_leaves_the_network_as_it_was():
    network = fresh()
    before = store.plain_state(network)
    engine.evaluate(network, data.TestBatches(dataset(), CPU))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("average", [0, 0.5])
def test_going_on_from_any_epoch_ends_on_the_same_bits(average, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "KEEP_SECONDS", 0)
    whole, states = fresh(), []

    def keep(state: dict) -> None:
        store.save(tmp_path / f"{len(states)}.pt", state)
        states.append(tmp_path / f"{len(states)}.pt")

    history = fit(whole, epochs=3, keep=keep, average=average)
    assert len(states) == 3
    for path in states:
        network = fresh()
        with torch.no_grad():  # nothing of where it ends may come from where it starts
            network.linear.weight.zero_()
        assert fit(network, epochs=3, state=store.load(path), average=average) == history
        assert same(network, whole)


@pytest.mark.parametrize(("average", "stops"), [(0, 6), (0.5, 7)])  # once more in the pass for BatchNorm
def test_a_signal_stops_after_the_step_in_hand_and_resuming_ends_on_the_same_bits(average, stops, monkeypatch):
    whole = fresh()
    history = fit(whole, epochs=2, average=average)
    left = [True] * stops
    monkeypatch.setattr(engine, "stop_requested", lambda: bool(left) and left.pop())
    kept, resumed = [], None

    def keep(state: dict) -> None:
        kept.append(copy.deepcopy(state))

    while resumed is None:
        network = fresh()
        try:
            state = kept[-1] if kept else None
            resumed = fit(network, epochs=2, state=state, keep=keep, average=average)
        except utils.Interrupted:
            assert len(kept) < 12
    steps = len([state for state in kept if state["step"]])
    assert (steps, left) == (6, [])
    assert resumed == history
    assert same(network, whole)


def test_a_loss_that_is_not_finite_stops_with_the_epoch():
    network = fresh()
    with torch.no_grad():
        network.linear.bias[0] = float("nan")
    with pytest.raises(utils.Failure, match="not finite in test, epoch 1"):
        fit(network)
