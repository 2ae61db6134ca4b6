//! The attention kernels give the same bits whatever order their threads run in, and their mutants are found: a kernel without one of its
//! barriers, fences or waits, or with a wrong offset, fails or gives other numbers.

use super::emulator::{AMPERE, Emulator, HOPPER, Options, Replacement, is_there};

use attention_kernels::cuda::{
    Call, Element, Incoming, Inputs, Limits, Machine, MachineView, Memory, Region, Wanted, backward, forward,
};
use attention_kernels::mask::Rule;
use attention_kernels::philox::uniform;
use attention_kernels::{Dropout, Error, Layout};
use half::bf16;

const HEADS: usize = 2;
const KV_HEADS: usize = 1;

/// A call of attention whose tiles are many and end anywhere.
#[derive(Clone, Copy)]
struct Case {
    q_len: usize,
    kv_len: usize,
    dim: usize,
    /// Without options, or with dropout, which takes the kernels with all options.
    is_plain: bool,
    is_causal: bool,
}

/// 128 columns take two panels of shared memory. The numbers of tiles are odd and even. Without a mask the specialised kernel has fewer blocks
/// of threads than blocks of queries.
const CASES: [Case; 3] = [
    Case { q_len: 130, kv_len: 331, dim: 128, is_plain: true, is_causal: true },
    Case { q_len: 200, kv_len: 147, dim: 64, is_plain: false, is_causal: true },
    Case { q_len: 300, kv_len: 147, dim: 64, is_plain: true, is_causal: false },
];
const DECODING: Case = Case { q_len: 3, kv_len: 1200, dim: 128, is_plain: true, is_causal: true };

fn numbers(seed: u64, count: usize) -> Vec<u8> {
    uniform(seed, 2.0, count).flat_map(|x| bf16::from_f64(x).to_le_bytes()).collect()
}

fn view(memory: &dyn Memory, dims: [usize; 4]) -> MachineView<'_> {
    let strides = Layout::HeadsFirst.strides(dims);
    MachineView::new("tensor", Element::Bf16, Region::of_memory(memory), 0, strides, dims).unwrap()
}

/// The context and the gradients of query, key and value.
fn run(machine: &dyn Machine, case: Case) -> Result<Vec<Vec<u8>>, Error> {
    let Case { q_len, kv_len, dim, is_plain, is_causal } = case;
    let (of_queries, of_keys) = ([1, HEADS, q_len, dim], [1, KV_HEADS, kv_len, dim]);
    let tensors = [(1, of_queries), (2, of_keys), (3, of_keys), (4, of_queries)];
    let tensors = tensors.map(|(seed, dims)| (numbers(seed, dims.iter().product()), dims));
    let memory = tensors.each_ref().map(|(bytes, _)| machine.upload("tensor", bytes).unwrap());
    let [q, k, v, gradient] = [0, 1, 2, 3].map(|i| view(memory[i].as_ref(), tensors[i].1));
    let mask = if is_causal { Rule::Band { below: None, above: Some(0), offset: None } } else { Rule::Full };
    let inputs = Inputs {
        q,
        k,
        v,
        layout: Layout::HeadsFirst,
        scale: 1.0 / (dim as f64).sqrt(),
        softcap: None,
        mask: &mask,
        bias: None,
        slopes: None,
        sinks: None,
        dropout: (!is_plain).then_some(Dropout { p: 0.2, seed: 3, first: 0 }),
    };
    let call = Call::new(inputs)?;
    let (context, saved) = forward(machine, &call)?;
    let incoming = Incoming { context: Some([view(context.as_ref(), of_queries), gradient]), logsumexp: None };
    let gradients = backward(machine, &call, &saved, incoming, Wanted::default())?;
    [&context, &gradients.q, &gradients.k, &gradients.v].into_iter().map(|memory| memory.download()).collect()
}

fn orders() -> impl Iterator<Item = Options> {
    (0..10).flat_map(|seed| [false, true].map(|eager| Options { seed, eager, ..Options::default() }))
}

#[test]
fn every_order_gives_the_same_bits() {
    if !is_there() {
        return;
    }
    for limits in [AMPERE, HOPPER] {
        for case in CASES.into_iter().chain([DECODING]) {
            let expected = run(&Emulator::new(limits, Options::default()), case).unwrap();
            for options in orders() {
                assert!(run(&Emulator::new(limits, options), case).unwrap() == expected, "{limits:?}, {options:?}");
            }
        }
    }
}

/// Without a mask the specialised kernel has at most as many blocks of threads as there are multiprocessors.
#[test]
fn the_number_of_multiprocessors_changes_no_bit() {
    if !is_there() {
        return;
    }
    let [few, many] = [1, 1000].map(|multiprocessors| {
        let machine = Emulator::new(Limits { multiprocessors, ..HOPPER }, Options::default());
        let results = run(&machine, CASES[2]).unwrap();
        let launched = machine.launched();
        (results, launched.iter().find(|launched| launched.kernel == "attention_forward").unwrap().grid)
    });
    assert_eq!((few.1, many.1), (1, 6));
    assert!(few.0 == many.0);
}

/// Engines that a mutant is one of: the other doesn't compile the text, or doesn't need it.
const MMA: &[Limits] = &[AMPERE];
const WGMMA: &[Limits] = &[HOPPER];
const BOTH: &[Limits] = &[AMPERE, HOPPER];

struct Mutant {
    what: &'static str,
    engines: &'static [Limits],
    replacement: Replacement<'static>,
}

const fn mutant(
    what: &'static str,
    engines: &'static [Limits],
    file: &'static str,
    (from, nth): (&'static str, usize),
    to: &'static str,
) -> Mutant {
    Mutant { what, engines, replacement: Replacement { file, from, to, nth } }
}

#[rustfmt::skip]
const MUTANTS: &[Mutant] = &[
    // The loop of wgmma stands before that of mma.sync in the file.
    mutant("forward: first barrier", WGMMA, "forward.cu", ("publish();", 2), ""),
    mutant("forward: first barrier", MMA, "forward.cu", ("publish();", 4), ""),
    mutant("forward: second barrier", MMA, "forward.cu", ("publish();", 5), ""),
    mutant("forward: last barrier", WGMMA, "forward.cu", ("publish();", 3), ""),
    mutant("forward: wait for the first keys", WGMMA, "forward.cu", ("wait_for_copies<2>();", 1), ""),
    mutant("forward: wait for copies", WGMMA, "forward.cu", ("wait_for_copies<0>();", 1), ""),
    mutant("forward: wait for keys", MMA, "forward.cu", ("wait_for_copies<0>();", 3), ""),
    mutant("forward: wait for values", MMA, "forward.cu", ("wait_for_copies<0>();", 4), ""),
    mutant("forward: wait for scores", WGMMA, "forward.cu", ("wait_for_products<0>();", 1), ""),
    mutant("forward: wait for the context", WGMMA, "forward.cu", ("wait_for_products<0>();", 2), ""),
    mutant("forward: stage of the keys", WGMMA, "forward.cu", ("k_tile(stage ^ 1)", 1), "k_tile(stage)"),
    mutant("forward: next tile", WGMMA, "forward.cu", ("next * KEYS", 1), "tile * KEYS"),
    mutant("forward: next tile", MMA, "forward.cu", ("next * KEYS", 4), "tile * KEYS"),
    mutant("specialised: empty queries", WGMMA, "forward_specialised.cuh", ("to.queries.wait_until_empty(of_queries);", 1), ""),
    mutant("specialised: used queries", WGMMA, "forward_specialised.cuh", ("from.queries.used(of_queries);", 1), ""),
    mutant("specialised: next queries", WGMMA, "forward_specialised.cuh", ("of_queries = of_queries.next(1);\n            }", 1), "}"),
    mutant("specialised: empty keys", WGMMA, "forward_specialised.cuh", ("to.keys.wait_until_empty(where);", 1), ""),
    mutant("specialised: empty values", WGMMA, "forward_specialised.cuh", ("to.values.wait_until_empty(where);", 1), ""),
    mutant("specialised: first keys", WGMMA, "forward_specialised.cuh", ("from.keys.wait_until_full(at);", 1), ""),
    mutant("specialised: full values", WGMMA, "forward_specialised.cuh", ("from.values.wait_until_full(before);", 1), ""),
    mutant("specialised: last values", WGMMA, "forward_specialised.cuh", ("from.values.wait_until_full(at);", 1), ""),
    mutant("specialised: fence", WGMMA, "forward_specialised.cuh", ("publish_to_wgmma();", 2), ""),
    mutant("specialised: wait for scores", WGMMA, "forward_specialised.cuh", ("wait_for_products<1>();", 1), ""),
    mutant("specialised: wait for the context", WGMMA, "forward_specialised.cuh", ("wait_for_products<0>();", 2), ""),
    mutant("specialised: used keys", WGMMA, "forward_specialised.cuh", ("from.keys.used(at);", 1), ""),
    mutant("forward: last query", BOTH, "forward.cu", ("if (query >= p.q_len) continue;", 1), ""),
    mutant("fence", WGMMA, "engine.cuh", ("publish_to_wgmma();", 1), ""),
    mutant("barrier of publish", BOTH, "engine.cuh", ("    __syncthreads();\n}", 1), "}"),
    mutant("swizzle of the copies", BOTH, "engine.cuh", ("to = row * 128 + ((chunk ^ (row % 8)) * 16);", 1), "to = row * 128 + chunk * 16;"),
    mutant("offset of a step", MMA, "engine.cuh", ("(b_lane ^ (i % 4 * 32)) + i / 4 * b.PANEL", 1), "(b_lane ^ (i % 4 * 16)) + i / 4 * b.PANEL"),
    mutant("offset of a panel", WGMMA, "engine.cuh", ("descriptor(b.address + i / 4 * b.PANEL", 1), "descriptor(b.address + i / 4 * 128"),
    mutant("distance of panels", WGMMA, "engine.cuh", ("j * 16 * 128, b.PANEL), true)", 1), "j * 16 * 128, b.PANEL / 2), true)"),
    mutant("rows behind the end", BOTH, "engine.cuh", ("const bool there = ALL || first + row", 1), "const bool there = true || first + row"),
    mutant("keys: barrier", BOTH, "backward.cu", ("publish();", 1), ""),
    mutant("queries: barrier", BOTH, "backward.cu", ("publish();", 2), ""),
    mutant("keys: wait for copies", BOTH, "backward.cu", ("            wait_for_copies<0>();\n            publish();", 1), "            publish();"),
    mutant("keys: wait for scores", WGMMA, "backward.cu", ("wait_for_products<OF_KEYS>();", 1), ""),
    mutant("keys: wait for gradients of weights", WGMMA, "backward.cu", ("wait_for_products<OF_VALUES>();", 1), ""),
    mutant("keys: last wait", WGMMA, "backward.cu", ("wait_for_products<0>();", 1), ""),
    mutant("keys: barrier between heads", BOTH, "backward.cu", ("        wait_for_copies<0>();\n        __syncthreads();", 1), "        wait_for_copies<0>();"),
    mutant("keys: stage", BOTH, "backward.cu", ("load(next, stage ^ 1)", 1), "load(next, stage)"),
    mutant("queries: stage", BOTH, "backward.cu", ("load(next, stage ^ 1)", 2), "load(next, stage)"),
    mutant("queries: wait for scores", WGMMA, "backward.cu", ("wait_for_products<1>();", 1), ""),
    mutant("queries: last wait", WGMMA, "backward.cu", ("wait_for_products<0>();", 3), ""),
    mutant("queries behind the end", BOTH, "gradients.cuh", ("if (ALL || query < p.q_len)", 1), "if (true)"),
    mutant("dropout of another key", BOTH, "scores.cuh", ("key / 4);\n    const uint32_t other0", 1), "key / 4 + 1);\n    const uint32_t other0"),
];

const OF_DECODING: &[Mutant] = &[
    mutant("decoding: barrier", BOTH, "decode.cu", ("publish();", 1), ""),
    mutant("decoding: wait for copies", BOTH, "decode.cu", ("wait_for_copies<0>();", 1), ""),
    mutant("decoding: parts of the keys", BOTH, "decode.cu", ("(split + 1) / p.splits", 1), "split / p.splits"),
];

/// The mutants that no order finds.
fn unfound(mutants: &[Mutant], cases: &[Case]) -> Vec<String> {
    let tries = [(0, false), (1, false), (2, true), (3, false)];
    let mut unfound = Vec::new();
    for mutant in mutants {
        for &limits in mutant.engines {
            let is_found = cases.iter().any(|&case| {
                let right = run(&Emulator::new(limits, Options::default()), case).unwrap();
                tries.into_iter().any(|(seed, eager)| {
                    let options = Options { seed, eager, ..Options::default() };
                    let results = run(&Emulator::of_mutant(limits, options, &[mutant.replacement]), case);
                    // A mutant that isn't found has to compile.
                    if let Err(Error::Kernel { reason, .. }) = &results {
                        assert!(!reason.contains("error:"), "{}: {reason}", mutant.what);
                    }
                    results.is_err() || results.unwrap() != right
                })
            });
            if !is_found {
                unfound.push(format!("{} ({:?})", mutant.what, limits.capability));
            }
        }
    }
    unfound
}

#[test]
fn every_mutant_is_found() {
    if is_there() {
        assert_eq!(unfound(MUTANTS, &CASES), [""; 0]);
        assert_eq!(unfound(OF_DECODING, &[DECODING]), [""; 0]);
    }
}
