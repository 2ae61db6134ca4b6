//! Several ranks: threads of this process and, with the feature `mpi`, processes of `mpirun`. Both keep the same laws.

#[path = "../common/blocks.rs"]
mod blocks;
#[path = "../common/mod.rs"]
mod common;
mod context;
mod data;
mod disagreement;
mod laws;
#[path = "../common/layers.rs"]
mod layers;
#[cfg(feature = "mpi")]
mod mpirun;
mod ranks;
mod tensor;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use candle_attention::Result;
use candle_attention::parallel::Communicator;

/// The numbers of ranks that the laws are tested on.
const SIZES: [usize; 5] = [1, 2, 3, 4, 7];

/// A tenth of that is enough, even where a processor has several ranks and other work.
const HANG: Duration = Duration::from_secs(60);

type Ranks<'a> = &'a Arc<dyn Communicator>;

/// What `test` returns. A hang is a failure.
fn in_time<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = channel();
    let thread = std::thread::spawn(move || drop(done.send(test())));
    match wait.recv_timeout(HANG) {
        Ok(result) => result,
        Err(_) if thread.is_finished() => panic!("the test has panicked"),
        Err(_) => panic!("the ranks hang"),
    }
}

/// A law on each number of ranks, as threads.
fn on_threads(law: impl Fn(Ranks) -> Result<()> + Send + Sync + Copy + 'static) {
    for size in SIZES {
        in_time(move || candle_attention::parallel::threads(size, |ranks| law(&ranks))).unwrap();
    }
}

/// Makes a test of each law, and a list of all for the ranks of `mpirun`.
macro_rules! laws {
    ($module:ident: $($law:ident),* $(,)?) => {
        $(#[test]
        fn $law() {
            on_threads($module::$law);
        })*

        #[cfg(feature = "mpi")]
        fn $module() -> Vec<(&'static str, fn(Ranks) -> Result<()>)> {
            vec![$((stringify!($law), $module::$law)),*]
        }
    };
}

laws!(laws:
    all_reduce_adds_in_the_order_of_ranks,
    all_reduce_of_a_view_is_that_of_its_numbers,
    all_gather_has_every_rank_s_tensor,
    all_to_all_transposes,
    broadcast_is_the_root_s_tensor,
    a_ring_brings_everything_around,
    any_rotation_can_be_exchanged,
    calls_overlap_and_some_are_never_waited_for,
    bytes_are_those_of_theory,
    results_carry_no_gradient,
    a_message_keeps_the_numbers_of_its_start,
    results_stay_when_a_variable_is_set,
    bytes_are_gathered,
    runs_give_the_same_bits,
);

laws!(disagreement:
    of_shapes,
    of_dtypes,
    of_calls,
    of_roots,
    of_texts,
    of_what_they_agree_on,
    about_whether_a_tensor_can_be_summed,
    none_where_all_are_wrong,
);

laws!(data:
    mean_is_the_gradient_of_the_whole_batch,
    segments_have_the_bits_of_one_backward_pass,
    a_bucket_is_summed_while_the_rest_is_computed,
    parameters_may_have_several_dtypes,
    missing_gradients_are_zeros_if_any_rank_has_one,
    ranks_without_rows_do_not_count,
    every_row_is_of_one_rank,
    broadcast_makes_parameters_equal,
    other_parameters_are_errors_on_every_rank,
    wrong_gradients_are_named,
);

mod tensor_laws {
    pub use super::tensor::block::*;
    pub use super::tensor::faults::*;
    pub use super::tensor::layer::*;
}

laws!(tensor_laws:
    layer_is_that_of_one_process,
    masks_and_biases_are_those_of_the_whole,
    empty_inputs_have_gradients_of_zeros,
    weights_are_those_of_the_rank_s_heads,
    decoding_is_that_of_one_process,
    cross_attention_is_that_of_one_process,
    runs_of_layers_have_the_same_bits,
    gathered_layer_is_the_whole,
    gathered_layer_has_the_rotary_embedding_of_its_parts,
    scores_of_one_rank_may_overflow,
    parts_are_copies,
    initial_parameters_are_those_of_one_process,
    memory_of_parameters_is_shared,
    half_types_are_close,
    block_is_that_of_one_process,
    mlp_is_that_of_one_process,
    training_is_that_of_one_process,
    decoding_of_blocks_is_that_of_one_process,
    bytes_are_two_sums_a_pass,
    gathered_block_is_the_whole,
    heads_that_ranks_cannot_divide,
    other_configs_or_parameters,
    other_inputs_or_options,
    what_takes_a_whole_layer,
);
