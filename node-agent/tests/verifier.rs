//! What loading costs: how many instructions the kernel's verifier follows for each program. Under an
//! emulated CPU a hundred thousand of them take about a second, and every start of the agent loads all.

#[cfg(test)]
#[path = "support/place.rs"]
#[expect(dead_code, reason = "shared with tests that need more of it")]
mod place;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Instant};

    use aya::{
        EbpfLoader,
        programs::{Program, loaded_programs},
    };
    use node_agent::dataplane::object;

    use crate::place::is_possible;

    /// For one program. The largest takes a third of it on Linux 6.18.
    const ONE: u32 = 60_000;
    /// For all of them.
    const ALL: u32 = 250_000;

    #[test]
    fn the_verifier_is_done_with_every_program_soon() {
        if !is_possible() {
            return;
        }
        let mut object = EbpfLoader::new().load(object()).unwrap();
        let began = Instant::now();
        let mut followed = BTreeMap::new();
        for (name, program) in object.programs_mut() {
            if let Program::SchedClassifier(program) = &mut *program {
                program.load().unwrap();
            } else if let Program::CgroupSockAddr(program) = &mut *program {
                program.load().unwrap();
            } else if let Program::Xdp(program) = &mut *program {
                program.load().unwrap();
            }
            // A program of another kind is not loaded, and says so here.
            let id = program.info().unwrap().id();
            let info = loaded_programs().flatten().find(|info| info.id() == id).unwrap();
            followed.insert(name.to_owned(), info.verified_instruction_count().unwrap());
        }
        let all: u32 = followed.values().sum();
        let took = began.elapsed();
        assert!(followed.len() > 10 && followed.values().all(|count| *count > 0));
        let fits = followed.values().all(|count| *count <= ONE) && all <= ALL;
        assert!(fits, "{followed:#?}\n{all} instructions in {took:?}");
    }
}
