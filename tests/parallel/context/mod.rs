//! Context parallelism: several ranks together compute what one process computes.

mod agreement;
mod attention;
mod layer;
mod messages;
mod setup;
mod split;
