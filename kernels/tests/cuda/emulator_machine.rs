//! The emulator as a machine: memory, launches, errors.

use super::emulator::{AMPERE, Emulator, HOPPER, Options, Replacement, is_there};

use attention_kernels::cuda::{Call, Element, Inputs, Machine, MachineView, Memory, Region, forward};
use attention_kernels::mask::Rule;
use attention_kernels::philox::uniform;
use attention_kernels::{Error, Layout};
use half::bf16;

const HEADS: usize = 2;
const LEN: usize = 256;
const DIM: usize = 64;
const SCALE: f64 = 0.125;

fn numbers(seed: u64) -> Vec<bf16> {
    uniform(seed, 2.0, HEADS * LEN * DIM).map(bf16::from_f64).collect()
}

fn view(memory: &dyn Memory) -> MachineView<'_> {
    let dims = [1, HEADS, LEN, DIM];
    let strides = Layout::HeadsFirst.strides(dims);
    MachineView::new("tensor", Element::Bf16, Region::of_memory(memory), 0, strides, dims).unwrap()
}

/// The context of causal attention.
fn context(machine: &dyn Machine) -> Result<Vec<bf16>, Error> {
    let upload = |seed| {
        let bytes: Vec<u8> = numbers(seed).iter().flat_map(|x| x.to_le_bytes()).collect();
        machine.upload("tensor", &bytes).unwrap()
    };
    let [q, k, v] = [1, 2, 3].map(upload);
    let mask = Rule::Band { below: None, above: Some(0), offset: None };
    let inputs = Inputs {
        q: view(q.as_ref()),
        k: view(k.as_ref()),
        v: view(v.as_ref()),
        layout: Layout::HeadsFirst,
        scale: SCALE,
        softcap: None,
        mask: &mask,
        bias: None,
        slopes: None,
        sinks: None,
        dropout: None,
    };
    let (context, _saved) = forward(machine, &Call::new(inputs)?)?;
    let bytes = context.download()?;
    Ok(bytes.chunks(2).map(|x| bf16::from_le_bytes([x[0], x[1]])).collect())
}

/// The context in f64.
fn expected() -> Vec<f64> {
    let [q, k, v] = [1, 2, 3].map(|seed| numbers(seed).iter().map(|x| x.to_f64()).collect::<Vec<_>>());
    let row = |x: &[f64], i: usize| x[i * DIM..(i + 1) * DIM].to_vec();
    let mut context = Vec::new();
    for query in 0..HEADS * LEN {
        let keys = query / LEN * LEN..=query;
        let dot = |key| row(&q, query).iter().zip(row(&k, key)).map(|(a, b)| a * b).sum::<f64>();
        let weights: Vec<f64> = keys.clone().map(|key| (SCALE * dot(key)).exp()).collect();
        let total: f64 = weights.iter().sum();
        context.extend((0..DIM).map(|column| {
            keys.clone().zip(&weights).map(|(key, weight)| weight / total * v[key * DIM + column]).sum::<f64>()
        }));
    }
    context
}

#[test]
fn attention_runs_on_both_engines() {
    if !is_there() {
        return;
    }
    let expected = expected();
    for limits in [AMPERE, HOPPER] {
        let machine = Emulator::new(limits, Options { seed: 1, ..Options::default() });
        let got = context(&machine).unwrap();
        let error: f64 = got.iter().zip(&expected).map(|(a, b)| (a.to_f64() - b).powi(2)).sum();
        let norm: f64 = expected.iter().map(|x| x * x).sum();
        assert!((error / norm).sqrt() < 4e-3, "{limits:?}: {}", (error / norm).sqrt());
        let launched = machine.launched();
        assert_eq!(launched[0].kernel, "attention_forward");
        assert_eq!(launched[0].defines.contains(&"HOPPER".into()), limits == HOPPER);
        assert_eq!(launched[0].counters.bank_conflicts, 0);
    }
}

#[test]
fn memory_is_aligned_and_not_a_number_at_first() {
    let machine = Emulator::new(AMPERE, Options::default());
    for bytes in [0, 1, 255, 256, 1000] {
        let memory = machine.allocate("numbers", bytes).unwrap();
        assert_eq!((memory.bytes(), memory.address() % 256), (bytes, 0));
        assert_eq!(memory.download().unwrap(), vec![0xFF; bytes]);
        let copy: Vec<u8> = (0..bytes).map(|i| i as u8).collect();
        assert_eq!(machine.upload("numbers", &copy).unwrap().download().unwrap(), copy);
    }
    let refused = machine.allocate("numbers", usize::MAX / 2).err();
    assert_eq!(refused, Some(Error::Memory { what: "numbers", bytes: usize::MAX / 2 }));
}

#[test]
fn a_fault_of_a_kernel_is_an_error() {
    if !is_there() {
        return;
    }
    let from = "store_global(p.careful + blockIdx.x";
    let to = "store_global(p.careful + 1000 + blockIdx.x";
    let mutant = Replacement { file: "forward.cu", from, to, nth: 1 };
    match context(&Emulator::of_mutant(AMPERE, Options::default(), &[mutant])) {
        Err(Error::Kernel { kernel: "attention_forward", reason }) => {
            assert!(reason.contains("out of bounds"), "{reason}");
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}
