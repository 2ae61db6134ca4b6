//! Checkpoints of other programs: each layout is loaded with the meaning that it has there, is saved byte for byte, and
//! can be trained. One error lists all problems of a file.

mod bad_files;
mod bad_tensors;
mod builders;
mod meaning;
mod models;
mod names;
mod round_trip;
mod shards;
mod training;
mod unfit_configs;
