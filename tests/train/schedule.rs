//! Learning rates.

use candle_attention::train::Schedule;
use candle_attention::{AttentionError, Error};

#[test]
fn a_constant_rate_is_constant() {
    let schedule = Schedule::constant(0.3).unwrap();
    assert!([0, 1, usize::MAX].iter().all(|&step| schedule.learning_rate(step) == 0.3));
}

#[test]
fn rates_rise_to_the_highest_and_fall_to_the_last() {
    for schedule in
        [Schedule::warm_up_linear(0.4, 0.1, 4, 10).unwrap(), Schedule::warm_up_cosine(0.4, 0.1, 4, 10).unwrap()]
    {
        let rates: Vec<f64> = (0..12).map(|step| schedule.learning_rate(step)).collect();
        let warm_up = [0.1, 0.2, 0.3, 0.4, 0.4];
        assert!(rates.iter().zip(warm_up).all(|(rate, expected)| (rate - expected).abs() < 1e-15), "{rates:?}");
        assert!(rates[4..11].windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
        assert!((rates[7] - 0.25).abs() < 1e-15, "half of the way is half of the fall: {rates:?}");
        assert_eq!(rates[10..], [0.1, 0.1]);
    }
    let linear = Schedule::warm_up_linear(0.4, 0.1, 4, 10).unwrap();
    assert!((linear.learning_rate(5) - 0.35).abs() < 1e-15);
    let cosine = Schedule::warm_up_cosine(0.4, 0.1, 4, 10).unwrap();
    // cos(π / 3) = 1 / 2
    assert!((cosine.learning_rate(6) - 0.325).abs() < 1e-15);
}

#[test]
fn a_run_may_be_all_warm_up_or_have_none() {
    let all = Schedule::warm_up_cosine(1.0, 0.5, 3, 3).unwrap();
    assert_eq!([0, 2, 3].map(|step| all.learning_rate(step)), [1.0 / 3.0, 1.0, 0.5]);
    assert_eq!(Schedule::warm_up_linear(1.0, 0.0, 0, 2).unwrap().learning_rate(0), 1.0);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let refused = |schedule: Result<Schedule, Error>| match schedule {
        Err(Error::Attention(error @ AttentionError::Config { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let expected = "config, steps: expected at least 1, got 0";
    assert_eq!(refused(Schedule::warm_up_cosine(0.1, 0.0, 0, 0)), expected);
    let expected = "config, warm_up: expected at most steps, which is 5, got 6";
    assert_eq!(refused(Schedule::warm_up_linear(0.1, 0.0, 6, 5)), expected);
    let expected = "config, learning_rate: expected a finite number, at least 0, got NaN";
    assert_eq!(refused(Schedule::constant(f64::NAN)), expected);
    let expected = "config, last: expected a finite number, at least 0, got -1";
    assert_eq!(refused(Schedule::warm_up_linear(0.1, -1.0, 1, 5)), expected);
}

#[test]
fn a_schedule_in_json_is_checked_as_one_in_code() {
    let schedule = Schedule::warm_up_cosine(3e-4, 3e-5, 100, 5000).unwrap();
    let json = serde_json::to_string(&schedule).unwrap();
    assert_eq!(json, r#"{"fall":"cosine","learning_rate":0.0003,"last":0.00003,"warm_up":100,"steps":5000}"#);
    assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
    for json in [
        r#"{"fall":"cosine","learning_rate":0.1}"#,
        r#"{"fall":"linear","learning_rate":0.1,"warm_up":3,"steps":2}"#,
        r#"{"fall":"constant","learning_rate":0.1,"warmup":3}"#,
        r#"{"fall":"constant","learning_rate":-0.1}"#,
    ] {
        assert!(serde_json::from_str::<Schedule>(json).is_err(), "{json}");
    }
}
