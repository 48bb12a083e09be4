"""The model once more, in float64 NumPy and the slow obvious way: a loop over rows, heads, queries and keys.

Takes the same configs and the same trees of (plain, stacked) weights. Only whole texts: no cache.
"""

import math

import numpy as np
from ml_dtypes import bfloat16

from jaxlm import config


def norm(params, cfg, x):
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        row, scale = x[place], np.asarray(params["scale"], np.float64)
        if isinstance(cfg, config.RmsNorm):
            out[place] = row / math.sqrt((row**2).mean() + cfg.eps) * (scale + cfg.offset)
        else:
            out[place] = (row - row.mean()) / math.sqrt(row.var() + cfg.eps) * scale
            if cfg.bias:
                out[place] += np.asarray(params["bias"], np.float64)
    return out


def frequency(cfg, width, pair, total):
    """(radians per position, magnitude) of one rotated pair in a text of `total` tokens."""
    plain = cfg.base ** (-2 * pair / width)
    match cfg.scaling:
        case None:
            return plain, 1.0
        case config.LinearScaling(factor):
            return plain / factor, 1.0
        case config.DynamicNtkScaling(factor, length):
            growth = factor * max(total, length) / length - (factor - 1)
            return (cfg.base * growth ** (width / (width - 2))) ** (-2 * pair / width), 1.0
        case config.Llama3Scaling(factor, low, high, length):
            wavelength = 2 * math.pi / plain
            if wavelength < length / high:
                return plain, 1.0
            if wavelength > length / low:
                return plain / factor, 1.0
            smooth = (length / wavelength - low) / (high - low)
            return (1 - smooth) * plain / factor + smooth * plain, 1.0
        case config.YarnScaling() as scaling:
            def pair_that_turns(times):
                return width * math.log(scaling.length / (times * 2 * math.pi)) / (2 * math.log(cfg.base))
            low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, width - 1)
            slow = min(max((pair - low) / max(high - low, 1e-3), 0), 1)
            return plain / scaling.factor * slow + plain * (1 - slow), scaling.magnitude
        case config.LongRopeScaling() as scaling:
            divisors = scaling.long if total > scaling.length else scaling.short
            return plain / divisors[pair], scaling.magnitude


def rotate(cfg, width, x, position, total):
    """One head's vector [H] at a position."""
    out = x.copy()
    for pair in range(width // 2):
        a, b = (2 * pair, 2 * pair + 1) if cfg.interleaved else (pair, pair + width // 2)
        radians, magnitude = frequency(cfg, width, pair, total)
        cos, sin = magnitude * math.cos(position * radians), magnitude * math.sin(position * radians)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def alibi(cfg, head, query, key):
    if cfg.rounded:
        return float(bfloat16(float(bfloat16(cfg.slopes[head])) * float(bfloat16(key))))
    return -cfg.slopes[head] * abs(query - key)


def bucket(cfg, query, key):
    """Of a distance: one each up to the exact ones, then as many for each doubling."""
    count, first, away = cfg.buckets, 0, key - query
    if cfg.bidirectional:
        count, first, away = count // 2, count // 2 if away > 0 else 0, abs(away)
    else:
        away = max(-away, 0)
    exact = count // 2
    if away < exact:
        return first + away
    return first + min(exact + int(math.log(away / exact) / math.log(cfg.distance / exact) * (count - exact)), count - 1)


def allowed(cfg, query, key, mask):
    """query, key: (index in the row, position, segment); mask [T, T] or None."""
    if query[1] < 0 or key[1] < 0 or query[2] != key[2]:
        return False
    if cfg.window is not None and abs(query[1] - key[1]) >= cfg.window:
        return False
    if mask is not None:
        return bool(mask[query[0], key[0]])
    return key[1] <= query[1] or not cfg.causal


def cross(params, cfg, x, segments, source, source_segments):
    """Attention of x [B, T, D] to a source [B, S, D]: as all of one text, of which only the source is seen."""
    params = {name: leaf if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for name, leaf in params.items()}
    out = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        mine = 1 if segments is None else segments[b, t]
        seen = [s for s in range(source.shape[1]) if source_segments[b, s] == mine != 0]
        if not seen:
            continue
        projected = {}
        for name, y in (("q", x[b, t][None]), ("k", source[b, seen]), ("v", source[b, seen])):
            y = np.einsum("TD,DNH->TNH", y, params[name]) + (params[f"{name}_bias"] if cfg.bias else 0)
            if cfg.clip is not None:
                y = np.clip(y, -cfg.clip, cfg.clip)
            if cfg.qk_norm is not None and name != "v":
                y = norm(params[f"{name}_norm"], cfg.qk_norm.norm, y)
            projected[name] = y
        if cfg.position is not None:
            text = [i for i in range(len(x[b])) if segments is None or segments[b, i] == segments[b, t]]
            for name, place in (("q", [text.index(t)]), ("k", range(len(seen)))):
                for s, n in np.ndindex(projected[name].shape[:2]):
                    projected[name][s, n] = rotate(cfg.position, cfg.rotated, projected[name][s, n], place[s], 0)
        for n in range(cfg.heads):
            shared = n // (cfg.heads // cfg.kv_heads)
            scores = projected["k"][:, shared] @ projected["q"][0, n] * (cfg.scale or cfg.head_width**-0.5)
            if cfg.softcap is not None:
                scores = cfg.softcap * np.tanh(scores / cfg.softcap)
            shares = np.exp(scores)
            shares = shares / (shares.sum() + (math.exp(params["sinks"][n]) if cfg.sinks else 0))
            out[b, t] += shares @ projected["v"][:, shared] @ params["o"][n]
        if cfg.out_bias:
            out[b, t] += params["o_bias"]
    return out


def latent_attention(params, cfg, x, positions, segments=None, mask=None, total=None):
    """Every head's keys and values made of each token's short vector; arguments as of `attention`."""
    params = {name: leaf if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for name, leaf in params.items()}
    scale = (cfg.key_width + cfg.rotated)**-0.5 if cfg.scale is None else cfg.scale
    out = np.zeros_like(x)

    def turned(y, position, length):
        return rotate(cfg.position, cfg.rotated, y, position, length)

    for b in range(x.shape[0]):
        length = int(max(positions[b].max() + 1, 0 if total is None else total[b]))
        tokens = [(t, int(positions[b, t]), 0 if segments is None else int(segments[b, t]))
                  for t in range(x.shape[1])]
        for query in tokens:
            y = x[b, query[0]]
            if cfg.query_latent is not None:
                y = y @ params["q_latent"] + (params["q_latent_bias"] if cfg.bias else 0)
                y = norm(params["q_latent_norm"], cfg.norm, y)
            for n in range(cfg.heads if query[1] >= 0 else 0):
                q, scores, values = y @ params["q"][:, n], [], []
                q = np.append(q[:cfg.key_width], turned(q[cfg.key_width:], query[1], length))
                for key in tokens:
                    if allowed(cfg, query, key, None if mask is None else mask[b]):
                        kept = x[b, key[0]] @ params["latent"] + (params["latent_bias"] if cfg.bias else 0)
                        short = norm(params["latent_norm"], cfg.norm, kept[:cfg.latent])
                        k = np.append(short @ params["k"][n], turned(kept[cfg.latent:], key[1], length))
                        scores.append(q @ k * scale)
                        values.append(short @ params["v"][n])
                shares = np.exp(np.array(scores) - max(scores))
                out[b, query[0]] += shares / shares.sum() @ np.array(values) @ params["o"][n]
            if cfg.out_bias and query[1] >= 0:
                out[b, query[0]] += params["o_bias"]
    return out


def attention(params, cfg, x, positions, segments=None, mask=None, total=None, table=None):
    """x [B, T, D], positions [B, T], mask [B, T, T], total [B], a shared bias's table; tokens at a position of -1 get zeros."""
    if isinstance(cfg, config.LatentAttention):
        return latent_attention(params, cfg, x, positions, segments, mask, total)
    params = {name: leaf if isinstance(leaf, dict) else np.asarray(leaf, np.float64)
              for name, leaf in params.items()}
    scale = cfg.head_width**-0.5 if cfg.scale is None else cfg.scale
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        length = int(max(positions[b].max() + 1, 0 if total is None else total[b]))
        tokens = [(t, int(positions[b, t]), 0 if segments is None else int(segments[b, t]))
                  for t in range(x.shape[1])]
        projected = {}
        for name in "qkv":
            y = np.einsum("TD,DNH->TNH", x[b], params[name])
            if cfg.bias:
                y = y + params[f"{name}_bias"]
            if cfg.clip is not None:
                y = np.minimum(np.maximum(y, -cfg.clip), cfg.clip)
            if cfg.qk_norm is not None and name != "v":
                whole = y if cfg.qk_norm.per_head else y.reshape(len(y), -1)
                y = norm(params[f"{name}_norm"], cfg.qk_norm.norm, whole).reshape(y.shape)
            if isinstance(cfg.position, config.Rope) and name != "v":
                for t, n in np.ndindex(y.shape[:2]):
                    y[t, n] = rotate(cfg.position, cfg.rotated, y[t, n], tokens[t][1], length)
            projected[name] = y
        for query in tokens:
            seen = [key for key in tokens if allowed(cfg, query, key, None if mask is None else mask[b])]
            for n in range(cfg.heads if query[1] >= 0 else 0):
                shared = n // (cfg.heads // cfg.kv_heads)
                scores = []
                for key in seen:
                    score = projected["q"][query[0], n] @ projected["k"][key[0], shared] * scale
                    if cfg.softcap is not None:
                        score = cfg.softcap * math.tanh(score / cfg.softcap)
                    if isinstance(cfg.position, config.Alibi):
                        score += alibi(cfg.position, n, query[1], key[1])
                    if isinstance(cfg.position, config.RelativeBias):
                        numbers = table if cfg.position.shared else params["relative_bias"]
                        score += float(numbers[bucket(cfg.position, query[1], key[1]), n])
                    scores.append(math.exp(score))
                total_score = sum(scores) + (math.exp(params["sinks"][n]) if cfg.sinks else 0.0)
                for key, score in zip(seen, scores, strict=True):
                    out[b, query[0]] += score / total_score * projected["v"][key[0], shared] @ params["o"][n]
            if cfg.out_bias and query[1] >= 0:
                out[b, query[0]] += params["o_bias"]
    return out


def activation(kind, x):
    match kind:
        case config.Activation.SILU:
            return x / (1 + np.exp(-x))
        case config.Activation.GELU:
            return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        case config.Activation.GELU_TANH:
            return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case config.Activation.RELU:
            return np.where(x > 0, x, 0)
        case config.Activation.SQUARED_RELU:
            return np.where(x > 0, x, 0) ** 2
        case config.Activation.TANH:
            return np.tanh(x)
        case config.Activation.QUICK_GELU:
            return x / (1 + np.exp(-1.702 * x))


def feedforward(params, cfg, x):
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}

    def project(name, y):
        y = y @ params[name]
        return y + params[f"{name}_bias"] if cfg.bias else y

    if cfg.gated:
        gate, up = project("gate", x), project("up", x)
        if cfg.clip is not None:
            gate, up = np.where(gate > cfg.clip, cfg.clip, gate), np.where(abs(up) > cfg.clip, np.sign(up) * cfg.clip, up)
        return project("down", activation(cfg.activation, gate) * (up + cfg.offset))
    return project("down", activation(cfg.activation, project("up", x)))


class Routers:
    """What the routers of a stack know beside a token's vector: ids, the GRU that they share and, layer by layer, its state."""

    def __init__(self, tokens=None, gru=None):
        self.tokens, self.gru, self.states, self.did = tokens, gru, {}, []


def gru(params, x, state):
    """One step for one token: x, state [P]."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    fed = [x @ params["input"][:, i] + params["input_bias"][i] for i in range(3)]
    kept = [state @ params["state"][:, i] + params["state_bias"][i] for i in range(3)]
    reset, update = (1 / (1 + np.exp(-fed[i] - kept[i])) for i in range(2))
    return (1 - update) * np.tanh(fed[2] + reset * kept[2]) + update * state


def hashed(token, k, seed, experts):
    x = (token + seed * 0x9E3779B9 + 0x7F4A7C15) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    first = (x ^ x >> 16) % experts
    return [(first + i * experts // k) % experts for i in range(k)]


def highest(scores, count):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def choose(params, cfg, logits):
    """(experts, weights, probabilities) of a token, by a `TopK`."""
    scores = np.exp(logits) / np.exp(logits).sum() if cfg.score is config.Score.SOFTMAX else 1 / (1 + np.exp(-logits))
    ranked = scores + (params["correction"] if cfg.correction else 0)
    if cfg.groups is not None:
        size = len(logits) // cfg.groups.count
        groups = [list(range(g * size, (g + 1) * size)) for g in range(cfg.groups.count)]
        best = [sum(sorted(ranked[i] for i in group)[-cfg.groups.best:]) for group in groups]
        allowed = [i for g in highest(best, cfg.groups.chosen) for i in groups[g]]
        ranked = [ranked[i] if i in allowed else -math.inf for i in range(len(logits))]
    experts = highest(ranked, cfg.k)
    weights = scores[experts]
    if cfg.normalize:
        weights = weights / weights.sum()
    return experts, weights * cfg.scale, scores / scores.sum()


def route(params, cfg, row, place, known):
    """(experts or None, weights, probabilities, logits) of the token at `place`."""
    table = {name: leaf if isinstance(leaf, dict) else np.asarray(leaf, np.float64)
             for name, leaf in params.get("router", {}).items()}
    router = cfg.router
    if isinstance(router, config.Recurrent):
        state = known.states.get(place, np.zeros(router.width))
        row = known.states[place] = gru(known.gru, row @ table["projection"], state)
        router = router.choice
    match router:
        case config.TopK():
            logits = row @ table["product"] + (table["bias"] if router.bias else 0)
            return *choose(table, router, logits), logits
        case config.ExpertChoice():
            logits = row @ table["product"]
            return None, None, np.exp(logits) / np.exp(logits).sum(), logits
        case config.ReluNorm():
            logits = row @ table["product"]
            active = np.where(logits > 0, logits, 0)
            return None, norm(table["norm"], router.norm, active), active / max(active.sum(), 1e-30), logits
        case config.Hash():
            experts = hashed(int(known.tokens[place]), router.k, router.seed, cfg.experts)
            share = np.full(router.k, 1 / router.k)
            return experts, share, sum(np.eye(cfg.experts)[e] for e in experts) / router.k, np.zeros(cfg.experts)
        case config.AverageKey():
            keys = np.asarray(params["experts"]["gate" if cfg.expert.gated else "up"], np.float64)
            logits = np.array([np.mean([row @ keys[e][:, f] for f in range(keys.shape[2])]) for e in range(cfg.experts)])
            return highest(logits, router.k), np.ones(router.k), np.exp(logits) / np.exp(logits).sum(), logits


def moe(params, cfg, x, positions, known=None):
    """(x [B, T, D] through the mixture, what the router did by the names of `Routing`): a loop over tokens."""
    batch, length = x.shape[:2]
    places = [place for place in np.ndindex(batch, length) if positions[place] >= 0]
    routes = {place: route(params, cfg, x[place], place, known) for place in places}
    pairs = {}  # (place, expert) -> weight
    dropped, experts = 0, None
    if isinstance(cfg.router, config.ExpertChoice):
        room = math.ceil(cfg.router.capacity * length / cfg.experts)
        for b, e in np.ndindex(batch, cfg.experts):
            mine = [place for place in places if place[0] == b]
            for i in highest([routes[place][2][e] for place in mine], room):
                pairs[mine[i], e] = routes[mine[i]][2][e]
    elif isinstance(cfg.router, config.ReluNorm):
        pairs = {(place, e): routes[place][1][e] for place in places for e in range(cfg.experts)}
    else:
        k = (cfg.router.choice if isinstance(cfg.router, config.Recurrent) else cfg.router).k
        experts = np.full((batch, length, k), cfg.experts)
        room = {None: lambda: length * k, config.CapacityTokens: lambda: cfg.capacity.tokens,
                config.CapacityFactor: lambda: math.ceil(cfg.capacity.factor * k * length / cfg.experts),
                config.CapacityFraction: lambda: math.ceil(cfg.capacity.fraction * length)}[
                    None if cfg.capacity is None else type(cfg.capacity)]()
        fraction = isinstance(cfg.capacity, config.CapacityFraction)
        turns = sorted(places, key=lambda place: -routes[place][2].max()) if fraction and cfg.capacity.prioritized else places
        taken = np.zeros((batch, cfg.experts), int)
        for choice in range(k):
            for place in turns:
                e = routes[place][0][choice]
                if taken[place[0], e] < room:
                    taken[place[0], e] += 1
                    experts[place][choice] = e
                    pairs[place, e] = routes[place][1][choice]
                else:
                    dropped += 1
        if fraction and cfg.capacity.rescale:
            for place in places:
                mine = [(place, e) for e in experts[place] if e < cfg.experts]
                rest = sum(pairs[one] for one in mine)
                for one in mine:
                    pairs[one] *= sum(routes[place][1]) / rest
    out = np.zeros_like(x)
    for (place, e), weight in pairs.items():
        out[place] += weight * feedforward({name: leaf[e] for name, leaf in params["experts"].items()}, cfg.expert, x[place])
    for place in np.ndindex(batch, length):
        if cfg.shared is not None:
            beside = feedforward(params["shared"], cfg.shared, x[place])
            gate = x[place] @ np.asarray(params["shared_gate"], np.float64)[:, 0] if cfg.shared_gate else math.inf
            out[place] += beside / (1 + math.exp(-gate))
    relu = isinstance(cfg.router, config.ReluNorm)
    load = np.zeros(cfg.experts)
    chose = pairs if experts is None else [(place, e) for place in places for e in routes[place][0]]
    for place, e in chose:
        load[e] += routes[place][3][e] > 0 if relu else 1
    did = {"tokens": len(places), "scores": sum(routes[place][1 if relu else 2] for place in places), "load": load,
           "entropy": -sum(p * math.log(p) for place in places for p in routes[place][2] if p > 0), "dropped": dropped,
           "squares": sum(math.log(np.exp(routes[place][3]).sum()) ** 2 for place in places), "experts": experts,
           "active": np.stack([[routes[b, t][1] if (b, t) in routes else np.zeros(cfg.experts) for t in range(length)]
                               for b in range(batch)]) if relu else None}
    if known is not None:
        known.did.append(did)
    return out, did


def block(params, cfg, x, positions, segments=None, mask=None, total=None, table=None, source=None, routers=None):
    known = positions, segments, mask, total, table

    def n(name, y):
        return norm(params[name], cfg.residual.norm, y)

    def a(y):
        return attention(params["attention"], cfg.attention, y, *known)

    def c(y):
        return cross(params["cross_attention"], cfg.cross, y, segments, *source)

    def f(y):
        if isinstance(cfg.feedforward, config.Moe):
            return moe(params["feedforward"], cfg.feedforward, y, positions, routers)[0]
        return feedforward(params["feedforward"], cfg.feedforward, y)

    m = cfg.multiplier
    match cfg.residual:
        case config.PreNorm():
            x = x + m * a(n("attention_norm", x) if cfg.residual.attention else x)
            if cfg.cross is not None:
                x = x + m * c(n("cross_attention_norm", x))
            return x + m * f(n("feedforward_norm", x))
        case config.PostNorm():
            x = n("attention_norm_out", x + m * a(x))
            if cfg.cross is not None:
                x = n("cross_attention_norm_out", x + m * c(x))
            return n("feedforward_norm_out", x + m * f(x))
        case config.OutputNorm():
            x = x + m * n("attention_norm_out", a(x))
            if cfg.cross is not None:
                x = x + m * n("cross_attention_norm_out", c(x))
            return x + m * n("feedforward_norm_out", f(x))
        case config.SandwichNorm():
            x = x + m * n("attention_norm_out", a(n("attention_norm", x)))
            if cfg.cross is not None:
                x = x + m * n("cross_attention_norm_out", c(n("cross_attention_norm", x)))
            return x + m * n("feedforward_norm_out", f(n("feedforward_norm", x)))
        case config.ParallelNorm(shared=shared):
            feed = n("attention_norm" if shared else "feedforward_norm", x)
            looked = 0 if cfg.cross is None else c(n("attention_norm" if shared else "cross_attention_norm", x))
            return x + m * a(n("attention_norm", x)) + m * looked + m * f(feed)


def at_repeat(tree, repeat):
    return {name: at_repeat(leaf, repeat) if isinstance(leaf, dict) else np.asarray(leaf, np.float64)[repeat]
            for name, leaf in tree.items()}


def layers(params, cfg, x, *known):
    """x after 0, 1, 2 ... blocks of a stack."""
    states = [x]
    for layer, one in enumerate(cfg.blocks()):
        group, place, repeat = cfg.place(layer)
        states.append(block(at_repeat(params[str(group)][str(place)], repeat), one, states[-1], *known))
    return states


def embed(params, cfg, tokens, positions, types=None):
    x = np.asarray(params["tokens"], np.float64)[tokens] * (1.0 if cfg.scale is None else cfg.scale)
    if isinstance(cfg.position, config.Learned):
        x = x + np.asarray(params["positions"], np.float64)[np.maximum(positions, 0) + cfg.position.offset]
    if isinstance(cfg.position, config.Sinusoidal):
        pairs = x.shape[-1] // 2
        for (b, t), position in np.ndenumerate(np.maximum(positions, 0) + cfg.position.offset):
            for pair in range(pairs):
                angle = position * cfg.position.base ** -(pair / (pairs - 1 if cfg.position.reaching else pairs))
                x[b, t, pair] += math.sin(angle)
                x[b, t, pair + pairs] += math.cos(angle)
    if cfg.types is not None:
        x = x + np.asarray(params["types"], np.float64)[0 if types is None else types]
    if cfg.norm is not None:
        x = norm(params["norm"], cfg.norm, x)
    if cfg.width is not None:
        x = x @ np.asarray(params["projection"], np.float64) + np.asarray(params["projection_bias"], np.float64)
    return x


def transform(params, cfg, x):
    y = x @ np.asarray(params["product"], np.float64) + (np.asarray(params["bias"], np.float64) if cfg.bias else 0)
    y = activation(cfg.activation, y)
    return y if cfg.norm is None else norm(params["norm"], cfg.norm, y)


def pool(cfg, rows):
    """One vector of the vectors [T, D] of a text's tokens."""
    match cfg:
        case config.Pooling.MEAN:
            return rows.mean(0)
        case config.Pooling.FIRST:
            return rows[0]
        case config.Pooling.LAST:
            return rows[-1]
        case config.Pooling.MAX:
            return rows.max(0)
        case config.Pooling.WEIGHTED_MEAN:
            weights = np.arange(1, len(rows) + 1)
            return (weights[:, None] * rows).sum(0) / weights.sum()


def head(params, table, cfg, x):
    if cfg.transform is not None:
        x = transform(params["transform"], cfg.transform, x)
    y = x @ np.asarray(table if cfg.tied else params["out"], np.float64).T
    if cfg.bias:
        y = y + np.asarray(params["bias"], np.float64)
    y = y * cfg.scale
    return y if cfg.softcap is None else cfg.softcap * np.tanh(y / cfg.softcap)


def read(params, cfg, x, positions):
    """What an encoder's head makes of x [B, T, D]."""
    params = {name: leaf if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for name, leaf in params.items()}
    rows = x if cfg.pooling is None else np.stack([pool(cfg.pooling, x[b][positions[b] >= 0]) for b in range(len(x))])
    if isinstance(cfg, config.Classifier) and cfg.transform is not None:
        rows = transform(params["transform"], cfg.transform, rows)
    if "out" in params:
        rows = rows @ params["out"]
    if cfg.bias:
        rows = rows + params["bias"]
    if isinstance(cfg, config.Vector) and cfg.normalize:
        rows = rows / np.sqrt((rows**2).sum(-1, keepdims=True))
    return rows


def side(params, cfg, tokens, positions=None, segments=None, mask=None, total=None, source=None, types=None, routers=None):
    """(what the head gives, what it reads, states after 0 to L blocks) of a decoder or an encoder; `routers` learns what they
    did, layer by layer."""
    tokens = np.asarray(tokens)
    routers = Routers() if routers is None else routers
    routers.tokens, routers.gru = tokens, params.get("routing")
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    states = layers(params["blocks"], cfg.stack, embed(params["embedding"], cfg.embedding, tokens, positions, types),
                    np.asarray(positions), segments, mask, total, params.get("relative_bias"), source, routers)
    last = states[-1] if cfg.norm is None else norm(params["norm"], cfg.norm, states[-1])
    if cfg.head is None:
        return None, last, states
    if isinstance(cfg.head, config.Head):
        return head(params.get("head"), params["embedding"]["tokens"], cfg.head, last), last, states
    return read(params.get("head", {}), cfg.head, last, np.asarray(positions)), last, states


def decoder(params, cfg, tokens, *known, **more):
    """(logits [B, T, V], states after 0 to L blocks)."""
    logits, _, states = side(params["decoder"], cfg, tokens, *known, **more)
    return logits, states


def encoder_decoder(params, cfg, inputs, tokens, input_segments=None, segments=None):
    """Logits [B, T, V] of the decoder's tokens; where there are segments, positions begin anew in each."""
    def count(segments):
        if segments is None:
            return None
        starts = [[max(i for i in range(t + 1) if i == 0 or row[i] != row[i - 1]) for t in range(len(row))] for row in segments]
        return np.where(segments == 0, -1, np.arange(segments.shape[1]) - np.array(starts))

    tree = params["encoder"]
    if cfg.shared:
        tree = tree | {"embedding": tree["embedding"] | {"tokens": params["decoder"]["embedding"]["tokens"]}}
    _, last, _ = side(tree, cfg.encoder, inputs, count(input_segments), input_segments)
    if cfg.projection:
        last = last @ np.asarray(params["projection"]["product"], np.float64) + np.asarray(params["projection"]["bias"])
    seen = np.ones(np.shape(inputs), int) if input_segments is None else input_segments
    return side(params["decoder"], cfg.decoder, tokens, count(segments), segments, None, None, (last, seen))[0]
