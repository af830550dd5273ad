//! Stories of the pod machine in virtual time, and the property that no order of events wedges it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::kubelet::runtime::ContainerState;

const SECOND: Duration = Duration::from_secs(1);

/// A machine with its clock, and ids `c0`, `c1`, … in the order of starts.
pub(super) struct Story {
    pub(super) machine: PodMachine,
    start: Instant,
    now: Instant,
    starts: u32,
}

pub(super) fn container(name: &str, role: Role) -> ContainerPlan {
    ContainerPlan {
        name: name.into(),
        role,
        restart_policy: None,
        image: "registry/image:1".into(),
        startup: None,
        liveness: None,
        readiness: None,
    }
}

pub(super) fn plan(restart_policy: RestartPolicy, containers: Vec<ContainerPlan>) -> PodPlan {
    let grace = Duration::from_secs(30);
    PodPlan { display: "web_default(uid)".to_owned(), restart_policy, grace, containers }
}

const fn probe(period: u64, failures: u32) -> ProbePlan {
    ProbePlan {
        initial_delay: Duration::ZERO,
        period: Duration::from_secs(period),
        timeout: SECOND,
        success_threshold: 1,
        failure_threshold: failures,
        grace: None,
    }
}

fn exit(code: i32) -> Exit {
    Exit {
        code,
        signal: 0,
        oom_killed: false,
        unstarted: false,
        at: Timestamp::UNIX_EPOCH,
        message: String::new(),
    }
}

impl Story {
    pub(super) fn new(plan: PodPlan) -> Self {
        Self::with(plan, &History::default())
    }

    pub(super) fn with(plan: PodPlan, history: &History) -> Self {
        let now = Instant::now();
        Self { machine: PodMachine::new(plan, history, now), start: now, now, starts: 0 }
    }

    pub(super) fn tick(&mut self) -> Vec<PodEffect> {
        let mut out = Vec::new();
        self.machine.handle_timeout(self.now, &mut out);
        out.retain(|effect| !matches!(effect, PodEffect::Record(_)));
        out
    }

    fn at(&mut self, seconds: u64) -> Vec<PodEffect> {
        self.now = self.start + Duration::from_secs(seconds);
        self.tick()
    }

    /// Tells an event and returns what is asked for, Events aside.
    pub(super) fn tell(&mut self, event: PodEvent) -> Vec<PodEffect> {
        let mut out = self.tell_all(event);
        out.retain(|effect| !matches!(effect, PodEffect::Record(_)));
        out
    }

    pub(super) fn tell_all(&mut self, event: PodEvent) -> Vec<PodEffect> {
        let mut out = Vec::new();
        self.machine.handle_event(event, self.now, &mut out);
        out
    }

    pub(super) fn sandbox(&mut self) -> Vec<PodEffect> {
        self.tell(PodEvent::SandboxReady { ips: vec!["10.244.0.2".parse().unwrap()] })
    }

    pub(super) fn start(&mut self, slot: usize) -> ContainerId {
        let asked = self.tell(PodEvent::ImageReady { slot, digest: "sha256:1".to_owned() });
        assert!(
            matches!(asked[..], [PodEffect::StartContainer { slot: s, .. }] if s == slot),
            "{asked:?}"
        );
        let id = ContainerId(format!("c{}", self.starts).into());
        self.starts += 1;
        let started = Started { pid: 1, at: Timestamp::UNIX_EPOCH };
        self.tell(PodEvent::Started { slot, id: id.clone(), started });
        id
    }

    pub(super) fn exit(&mut self, id: &ContainerId, code: i32) -> Vec<PodEffect> {
        self.tell(PodEvent::Exited { id: id.clone(), exit: exit(code) })
    }

    fn seconds_to_timeout(&self) -> Option<u64> {
        self.machine.poll_timeout().map(|at| (at - self.now).as_secs())
    }
}

pub(super) fn running_pod() -> (Story, ContainerId) {
    let mut story = Story::new(plan(RestartPolicy::Always, vec![container("a", Role::Main)]));
    assert_eq!(story.tick(), [PodEffect::EnsureSandbox]);
    assert_eq!(story.sandbox(), [PodEffect::PullImage { slot: 0 }]);
    let id = story.start(0);
    (story, id)
}

#[test]
fn crashes_are_restarted_at_once_then_after_10_20_40_80_160_300_300_seconds() {
    let (mut story, mut id) = running_pod();
    let mut pauses = Vec::new();
    for _ in 0..8 {
        let now = story.exit(&id, 1);
        let asked = if now.is_empty() {
            pauses.push(story.seconds_to_timeout().unwrap());
            assert_eq!(
                story.machine.slots()[0].restart_count,
                u32::try_from(pauses.len()).unwrap()
            );
            story.now = story.machine.poll_timeout().unwrap();
            story.tick()
        } else {
            pauses.push(0);
            now
        };
        assert_eq!(asked, [PodEffect::PullImage { slot: 0 }]);
        id = story.start(0);
    }
    assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 300, 300]);
    // After ten minutes of running the count starts anew.
    story.now += Duration::from_secs(601);
    assert_eq!(story.exit(&id, 1), [PodEffect::PullImage { slot: 0 }]);
}

/// An instance that could not be started.
fn refused(id: &str) -> (ContainerId, Exit) {
    (ContainerId(id.into()), Exit { unstarted: true, ..exit(128) })
}

#[test]
fn a_command_that_cannot_be_started_counts_as_an_end_and_is_tried_again_later_each_time() {
    let (mut story, ran) = running_pod();
    assert_eq!(story.exit(&ran, 1), [PodEffect::PullImage { slot: 0 }]);
    let mut shown = Vec::new();
    for number in 1..4 {
        story.tell(PodEvent::ImageReady { slot: 0, digest: String::new() });
        let told = story.tell_all(PodEvent::StartFailed {
            slot: 0,
            reason: "RunContainerError",
            message: "no such file".to_owned(),
            instance: Some(refused(&format!("r{number}"))),
        });
        let removed = told.contains(&PodEffect::RemoveContainer { id: ran.clone() });
        assert_eq!(removed, number == 1, "the instance that ran goes once, the others are gone");
        let notes = told.iter().filter_map(|effect| {
            let PodEffect::Record(note) = effect else { return None };
            Some((note.reason, note.message.as_str()))
        });
        let (reason, message) =
            ("BackOff", "Back-off restarting failed container a in pod web_default(uid)");
        assert!(notes.eq([("Failed", "Error: no such file"), (reason, message)]), "{told:?}");
        let slot = &story.machine.slots()[0];
        let Phase::Waiting { since, .. } = &slot.phase else { panic!("{slot:?}") };
        shown.push((since.reason, slot.restart_count, story.seconds_to_timeout().unwrap()));
        story.now = story.machine.poll_timeout().unwrap();
        assert_eq!(story.tick(), [PodEffect::PullImage { slot: 0 }]);
    }
    assert_eq!(shown, [2, 3, 4].map(|n| ("CrashLoopBackOff", n, 10 << (n - 2))));
}

#[test]
fn the_first_start_that_is_refused_is_shown_and_ends_a_pod_that_is_never_restarted() {
    for (policy, over) in [(RestartPolicy::Always, false), (RestartPolicy::Never, true)] {
        let mut story = Story::new(plan(policy, vec![container("a", Role::Main)]));
        story.tick();
        story.sandbox();
        story.tell(PodEvent::ImageReady { slot: 0, digest: String::new() });
        let instance = Some(refused("r"));
        let (reason, message) = ("RunContainerError", "no such file".to_owned());
        let asked = story.tell(PodEvent::StartFailed { slot: 0, reason, message, instance });
        assert_eq!(asked == [PodEffect::RemoveSandbox], over, "{policy:?}");
        let slot = &story.machine.slots()[0];
        if over {
            assert!(matches!(slot.phase, Phase::Exited), "{slot:?}");
        } else {
            let Phase::Waiting { since, .. } = &slot.phase else { panic!("{slot:?}") };
            assert_eq!((since.reason, story.seconds_to_timeout()), ("RunContainerError", Some(10)));
        }
    }
}

#[test]
fn restart_policy_decides_who_runs_again_and_when_the_pod_is_over() {
    let table = [
        (RestartPolicy::Always, 0, false),
        (RestartPolicy::Always, 1, false),
        (RestartPolicy::OnFailure, 0, true),
        (RestartPolicy::OnFailure, 1, false),
        (RestartPolicy::Never, 0, true),
        (RestartPolicy::Never, 1, true),
    ];
    for (policy, code, over) in table {
        let mut story = Story::new(plan(policy, vec![container("a", Role::Main)]));
        story.tick();
        story.sandbox();
        let id = story.start(0);
        let asked = story.exit(&id, code);
        let expected =
            if over { PodEffect::RemoveSandbox } else { PodEffect::PullImage { slot: 0 } };
        assert_eq!(asked, [expected], "{policy:?} {code}");
        assert_eq!(story.machine.is_ending(), over);
    }
}

#[test]
fn a_containers_own_restart_policy_counts_over_the_pods() {
    use RestartPolicy::{Always, Never, OnFailure};
    let table = [
        (Role::Main, Never, Some(Always), 0, true),
        (Role::Main, Never, Some(OnFailure), 1, true),
        (Role::Main, Never, Some(OnFailure), 0, false),
        (Role::Main, Always, Some(Never), 1, false),
        (Role::Init, Never, Some(OnFailure), 1, true),
        (Role::Init, Always, Some(Never), 1, false),
        (Role::Init, OnFailure, None, 1, true),
    ];
    for (role, pod, own, code, again) in table {
        let mut first = container("a", role);
        first.restart_policy = own;
        let mut other = container("b", Role::Main);
        other.restart_policy = Some(Never);
        let mut story = Story::new(plan(pod, vec![first, other]));
        story.tick();
        story.sandbox();
        let id = story.start(0);
        let asked = story.exit(&id, code);
        let started = asked.contains(&PodEffect::PullImage { slot: 0 });
        assert_eq!(started, again, "{role:?} {pod:?} {own:?} {code}: {asked:?}");
    }
}

#[test]
fn init_containers_run_one_after_the_other_and_sidecars_stay() {
    let containers = vec![
        container("first", Role::Init),
        container("side", Role::Sidecar),
        container("second", Role::Init),
        container("main", Role::Main),
    ];
    let mut story = Story::new(plan(RestartPolicy::Never, containers));
    story.tick();
    assert_eq!(story.sandbox(), [PodEffect::PullImage { slot: 0 }]);
    let first = story.start(0);
    assert_eq!(story.exit(&first, 0), [PodEffect::PullImage { slot: 1 }]);
    let side = story.start(1);
    let second = story.start(2);
    assert_eq!(story.exit(&second, 0), [PodEffect::PullImage { slot: 3 }]);
    let main = story.start(3);
    let asked = story.exit(&main, 0);
    let stop = |id: &ContainerId| PodEffect::StopContainer {
        slot: 1,
        id: id.clone(),
        grace: Duration::from_secs(30),
    };
    assert_eq!(asked, [stop(&side)], "the sidecar ends once the mains have");
    assert_eq!(story.exit(&side, 0), [PodEffect::RemoveSandbox]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let containers = vec![container("init", Role::Init), container("main", Role::Main)];
    let mut story = Story::new(plan(RestartPolicy::Never, containers));
    story.tick();
    story.sandbox();
    let init = story.start(0);
    assert_eq!(story.exit(&init, 3), [PodEffect::RemoveSandbox]);
}

#[test]
fn deletion_stops_reports_removes_and_lets_go_in_this_order() {
    let (mut story, id) = running_pod();
    let asked = story.tell(PodEvent::DeleteRequested { grace: Duration::from_secs(5) });
    let grace = Duration::from_secs(5);
    assert_eq!(asked, [PodEffect::StopContainer { slot: 0, id: id.clone(), grace }]);
    let again = story.tell(PodEvent::DeleteRequested { grace });
    assert_eq!(again, [], "the same request asks for nothing new");
    let shorter = story.tell(PodEvent::DeleteRequested { grace: Duration::ZERO });
    assert_eq!(shorter, [PodEffect::StopContainer { slot: 0, id: id.clone(), grace: MIN_GRACE }]);
    assert_eq!(story.exit(&id, 143), [PodEffect::RemoveSandbox]);
    assert_eq!(story.tell(PodEvent::SandboxRemoved), [PodEffect::DeleteFromApi]);
    assert_eq!(story.tell(PodEvent::DeletedFromApi), [PodEffect::Finish]);
    assert!(story.machine.is_finished());
    assert_eq!(story.machine.poll_timeout(), None);
}

#[test]
fn a_container_that_does_not_die_is_killed_again_and_then_given_up() {
    let (mut story, id) = running_pod();
    story.tell(PodEvent::DeleteRequested { grace: Duration::from_secs(5) });
    let kill = [PodEffect::StopContainer { slot: 0, id, grace: Duration::ZERO }];
    assert_eq!(story.at(14), []);
    assert_eq!(story.at(15), kill);
    assert_eq!(story.at(25), kill);
    assert_eq!(story.at(35), [PodEffect::RemoveSandbox]);
}

#[test]
fn an_image_error_is_shown_then_backed_off_and_tried_again() {
    let mut story = Story::new(plan(RestartPolicy::Always, vec![container("a", Role::Main)]));
    story.tick();
    story.sandbox();
    let failed = || PodEvent::ImageFailed {
        slot: 0,
        reason: "ErrImagePull",
        message: "manifest unknown".to_owned(),
    };
    let reason = |story: &Story| {
        let Phase::PullFailed { since, .. } = &story.machine.slots()[0].phase else {
            panic!("{:?}", story.machine.slots()[0])
        };
        since.clone()
    };
    let notes = story.tell_all(failed());
    assert!(
        notes.iter().any(|effect| matches!(effect, PodEffect::Record(note)
            if note.message == "Failed to pull image \"registry/image:1\": manifest unknown")),
        "{notes:?}"
    );
    assert_eq!(reason(&story).reason, "ErrImagePull");
    assert_eq!(story.at(2), []);
    assert_eq!(reason(&story).reason, "ImagePullBackOff");
    assert!(reason(&story).message.contains("manifest unknown"));
    assert_eq!(story.at(9), []);
    assert_eq!(story.at(10), [PodEffect::PullImage { slot: 0 }]);
    story.tell(failed());
    story.at(12);
    assert_eq!(story.seconds_to_timeout(), Some(18), "the second pause is 20 s");
}

#[test]
fn readiness_follows_its_probe_and_liveness_restarts() {
    let mut main = container("a", Role::Main);
    main.readiness = Some(probe(5, 2));
    main.liveness = Some(probe(7, 1));
    let mut story = Story::new(plan(RestartPolicy::Always, vec![main]));
    story.tick();
    story.sandbox();
    let id = story.start(0);
    let ready = |story: &Story| story.machine.slots()[0].running().unwrap().ready;
    assert!(!ready(&story), "initially not ready");
    let asked = story.tick();
    assert_eq!(asked.len(), 0, "the probes were asked for when the container started");
    let probed = |kind, success| PodEvent::Probed {
        slot: 0,
        id: id.clone(),
        kind,
        success,
        message: "refused".to_owned(),
    };
    story.tell(probed(ProbeKind::Readiness, true));
    assert!(ready(&story));
    story.tell(probed(ProbeKind::Readiness, false));
    assert!(ready(&story), "one failure is below the threshold");
    story.tell(probed(ProbeKind::Readiness, false));
    assert!(!ready(&story));
    let asked = story.tell_all(probed(ProbeKind::Liveness, false));
    assert!(asked.iter().any(|effect| matches!(effect, PodEffect::Record(note)
        if note.message == "Container a failed liveness probe, will be restarted")));
    assert!(asked.iter().any(|effect| matches!(effect, PodEffect::StopContainer { .. })));
    assert_eq!(story.exit(&id, 143), [PodEffect::PullImage { slot: 0 }]);
}

#[test]
fn a_startup_probe_holds_the_others_back() {
    let mut main = container("a", Role::Main);
    main.startup = Some(probe(1, 3));
    main.readiness = Some(probe(5, 1));
    let mut story = Story::new(plan(RestartPolicy::Always, vec![main]));
    story.tick();
    story.sandbox();
    let asked = story.tell(PodEvent::ImageReady { slot: 0, digest: String::new() });
    assert_eq!(asked, [PodEffect::StartContainer { slot: 0, restart_count: 0 }]);
    let id = ContainerId("x".into());
    let started = Started { pid: 1, at: Timestamp::UNIX_EPOCH };
    let kinds = |effects: &[PodEffect]| -> Vec<ProbeKind> {
        let kind = |effect: &PodEffect| {
            if let PodEffect::Probe { kind, .. } = effect { Some(*kind) } else { None }
        };
        effects.iter().filter_map(kind).collect()
    };
    let asked = story.tell(PodEvent::Started { slot: 0, id: id.clone(), started });
    assert_eq!(kinds(&asked), [ProbeKind::Startup]);
    let kind = ProbeKind::Startup;
    let message = String::new();
    let asked = story.tell(PodEvent::Probed { slot: 0, id, kind, success: true, message });
    assert_eq!(kinds(&asked), [ProbeKind::Readiness]);
}

/// A sandbox in which an earlier agent has started one container, for the third time.
pub(super) fn sandbox_with(name: &str, image: &str) -> SandboxState {
    SandboxState {
        uid: crate::kubelet::runtime::PodUid("uid".into()),
        namespace: "default".to_owned(),
        name: "web".to_owned(),
        ips: vec!["10.244.0.9".parse().unwrap()],
        containers: vec![ContainerState {
            id: ContainerId("old".into()),
            name: name.to_owned(),
            restart_count: 2,
            image_reference: image.to_owned(),
            image_digest: "sha256:1".to_owned(),
            pid: 7,
            started_at: Timestamp::UNIX_EPOCH,
            exit: None,
        }],
    }
}

#[test]
fn a_restarted_agent_takes_running_containers_over_and_keeps_their_readiness() {
    let mut main = container("a", Role::Main);
    main.readiness = Some(probe(5, 1));
    let history = History {
        sandbox: Some(sandbox_with("a", "registry/image:1")),
        containers: vec![ContainerHistory {
            name: "a".to_owned(),
            restart_count: 2,
            ready: true,
            started: true,
            ran: true,
            exit: None,
        }],
        over: false,
    };
    let mut story = Story::with(plan(RestartPolicy::Always, vec![main]), &history);
    let asked = story.tick();
    assert!(matches!(asked[..], [PodEffect::Probe { .. }]), "{asked:?}");
    let slot = &story.machine.slots()[0];
    assert!(slot.running().unwrap().ready);
    assert_eq!((slot.restart_count, story.machine.ips().len()), (2, 1));
}

#[test]
fn a_pod_that_was_over_is_never_started_and_can_be_deleted() {
    let history = History { over: true, ..History::default() };
    let mut story =
        Story::with(plan(RestartPolicy::Never, vec![container("a", Role::Main)]), &history);
    assert_eq!(story.tick(), []);
    let grace = Duration::from_secs(30);
    assert_eq!(story.tell(PodEvent::DeleteRequested { grace }), [PodEffect::DeleteFromApi]);
    assert_eq!(story.tell(PodEvent::DeleteFailed), []);
    assert_eq!(story.at(1), [PodEffect::DeleteFromApi]);
    assert_eq!(story.tell(PodEvent::DeletedFromApi), [PodEffect::Finish]);
}

#[test]
fn a_lost_sandbox_is_removed_and_made_anew() {
    let (mut story, _) = running_pod();
    assert_eq!(story.tell(PodEvent::SandboxLost), [PodEffect::RemoveSandbox]);
    assert_eq!(story.tell(PodEvent::SandboxRemoved), [PodEffect::EnsureSandbox]);
    assert_eq!(story.sandbox(), [PodEffect::PullImage { slot: 0 }]);
    assert_eq!(story.machine.slots()[0].restart_count, 1);
}

/// A world that answers every effect, well or badly, as the dice say.
struct World {
    story: Story,
    /// Answers on their way.
    pending: VecDeque<PodEvent>,
    alive: Vec<ContainerId>,
    ids: u32,
}

impl World {
    fn answer(&mut self, effects: Vec<PodEffect>, dice: u8) {
        let good = !dice.is_multiple_of(3);
        for effect in effects {
            let event = match effect {
                PodEffect::EnsureSandbox if good => PodEvent::SandboxReady { ips: Vec::new() },
                PodEffect::EnsureSandbox => {
                    PodEvent::SandboxFailed { reason: "FailedMount", message: String::new() }
                }
                PodEffect::PullImage { slot } if good => {
                    PodEvent::ImageReady { slot, digest: String::new() }
                }
                PodEffect::PullImage { slot } => {
                    PodEvent::ImageFailed { slot, reason: "ErrImagePull", message: String::new() }
                }
                PodEffect::StartContainer { slot, .. } if good => {
                    let id = ContainerId(format!("w{}", self.ids).into());
                    self.ids += 1;
                    self.alive.push(id.clone());
                    let started = Started { pid: 1, at: Timestamp::UNIX_EPOCH };
                    PodEvent::Started { slot, id, started }
                }
                PodEffect::StartContainer { slot, .. } => PodEvent::StartFailed {
                    slot,
                    reason: "RunContainerError",
                    message: String::new(),
                    instance: dice.is_multiple_of(2).then(|| refused(&format!("w{}", self.ids))),
                },
                // A stop that gets lost must be asked for again.
                PodEffect::StopContainer { id, .. } if good => self.die(&id, 143),
                PodEffect::RemoveSandbox if good => {
                    self.alive.clear();
                    PodEvent::SandboxRemoved
                }
                PodEffect::RemoveSandbox => PodEvent::SandboxStuck { message: String::new() },
                PodEffect::Probe { slot, id, kind, .. } => {
                    PodEvent::Probed { slot, id, kind, success: good, message: String::new() }
                }
                PodEffect::DeleteFromApi if good => PodEvent::DeletedFromApi,
                PodEffect::DeleteFromApi => PodEvent::DeleteFailed,
                PodEffect::StopContainer { .. }
                | PodEffect::RemoveContainer { .. }
                | PodEffect::Record(_)
                | PodEffect::Finish => continue,
            };
            self.pending.push_back(event);
        }
    }

    fn die(&mut self, id: &ContainerId, code: i32) -> PodEvent {
        self.alive.retain(|alive| alive != id);
        PodEvent::Exited { id: id.clone(), exit: exit(code) }
    }

    fn step(&mut self, dice: u8) {
        let event = match dice % 8 {
            0 if !self.alive.is_empty() => {
                let id = self.alive[usize::from(dice) % self.alive.len()].clone();
                Some(self.die(&id, i32::from(dice % 2)))
            }
            1 if dice > 240 => {
                self.alive.clear();
                Some(PodEvent::SandboxLost)
            }
            2 => None,
            3 if dice > 200 => {
                let mut plan = self.story.machine.plan().clone();
                let at = usize::from(dice) % plan.containers.len();
                plan.containers[at].image = format!("registry/image:{dice}").into();
                Some(PodEvent::SpecChanged { plan })
            }
            _ => {
                let at = usize::from(dice) % self.pending.len().max(1);
                self.pending.remove(at)
            }
        };
        let effects = match event {
            Some(event) => self.story.tell(event),
            None => {
                if let Some(at) = self.story.machine.poll_timeout() {
                    self.story.now = self.story.now.max(at);
                }
                self.story.tick()
            }
        };
        self.answer(effects, dice);
    }
}

proptest! {
    /// Whatever order things happen in: a live pod always waits for an answer, a time or a process,
    /// and a deleted one is gone in the end.
    #[test]
    fn no_order_of_events_wedges_a_pod(dice in prop::collection::vec(any::<u8>(), 0..300), policy in 0..3_u8) {
        let policy = [RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never]
            [usize::from(policy)];
        let mut main = container("main", Role::Main);
        main.liveness = Some(probe(3, 1));
        main.readiness = Some(probe(1, 1));
        let containers =
            vec![container("i", Role::Init), container("s", Role::Sidecar), main];
        let mut world = World {
            story: Story::new(plan(policy, containers)),
            pending: VecDeque::new(),
            alive: Vec::new(),
            ids: 0,
        };
        let effects = world.story.tick();
        world.answer(effects, 1);
        for die in dice {
            world.step(die);
            let machine = &world.story.machine;
            let waits = !world.pending.is_empty()
                || machine.poll_timeout().is_some()
                || !world.alive.is_empty()
                || machine.is_ending();
            prop_assert!(waits, "{machine:?}");
            let again = world.story.tick();
            prop_assert!(again.is_empty(), "a spurious call asked for {again:?}");
            let timeout = world.story.machine.poll_timeout();
            let due = timeout.is_some_and(|at| at <= world.story.now);
            prop_assert!(!due, "a timeout that stays due: {:?}", world.story.machine);
        }
        let effects = world.story.tell(PodEvent::DeleteRequested { grace: SECOND });
        world.answer(effects, 1);
        for round in 0..200_u8 {
            // From here on the world is kind: dice that answer well, in order, and let time pass.
            let effects = match world.pending.pop_front() {
                Some(event) => world.story.tell(event),
                None => {
                    if let Some(at) = world.story.machine.poll_timeout() {
                        world.story.now = world.story.now.max(at);
                    }
                    world.story.tick()
                }
            };
            world.answer(effects, 1);
            if world.story.machine.is_finished() {
                return Ok(());
            }
            let _ = round;
        }
        prop_assert!(false, "never finished: {:?}", world.story.machine);
    }
}
