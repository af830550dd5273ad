//! Random services, packets and sockets' questions, through the loaded programs and through a reference that
//! was written apart from them.
//!
//! `ORLOP_CASES` says how many packets and questions are compared, `ORLOP_SEED` where chance begins; a
//! failure prints the seed that repeats it, made small. A run of 10^7: `ORLOP_CASES=10000000 cargo test -p
//! node-agent --test model`.

#[cfg(test)]
#[expect(dead_code, reason = "real sockets are compared by another test")]
#[path = "model/mod.rs"]
mod model;
#[cfg(test)]
#[path = "support/runs.rs"]
mod runs;

#[cfg(test)]
mod tests {
    use std::{thread, time::Instant};

    use super::{
        model::{
            case::{Case, Tally},
            place::is_possible,
            rig::Rig,
        },
        runs,
    };

    /// Kinds of outcomes that there are.
    const KINDS: usize = 15;

    #[expect(clippy::print_stdout, reason = "how much was compared is what the run is for")]
    #[test]
    fn programs_do_what_the_reference_allows() {
        if !is_possible() {
            return;
        }
        let test = || {
            let mut rig = Rig::load();
            let (cases, first) = (runs::cases(100_000), runs::seed());
            let (mut seed, mut tally, start) = (first, Tally::new(), Instant::now());
            while tally.values().sum::<usize>() < cases {
                match Case::new(seed).run(&mut rig) {
                    Ok(more) => {
                        more.iter().for_each(|(what, n)| *tally.entry(what).or_default() += n)
                    }
                    Err(failure) => {
                        let (case, failure) = Case::new(seed).shrink(&mut rig, failure);
                        panic!("after {tally:?}:\n{case}{}", failure.words);
                    }
                }
                seed += 1;
                if seed.is_multiple_of(10_000) {
                    println!(
                        "{} after {} s",
                        tally.values().sum::<usize>(),
                        start.elapsed().as_secs()
                    );
                }
            }
            let (took, all) = (start.elapsed().as_secs(), tally.values().sum::<usize>());
            println!("{all} in {took} s, seeds {first} to {seed}: {tally:?}");
            // Chance reaches every kind of outcome often enough to say something about it.
            let rare = tally.iter().find(|(_, count)| **count < cases / 500);
            assert!(tally.len() == KINDS && rare.is_none(), "{rare:?} is rare");
        };
        // Namespaces are the thread's.
        thread::scope(|scope| scope.spawn(test).join())
            .expect("the case above is repeated by its seed");
    }
}
