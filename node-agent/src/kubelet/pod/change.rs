//! What a changed spec asks of a pod that is already at work. Pure.
//!
//! Of a container only the image may change (the API holds the rest fast), and, as upstream's kubelet does,
//! only that restarts it, whatever the restart policy is. A plain init container that runs goes on to its
//! end, and what has ended for good stays so.

use std::time::{Duration, Instant};

use super::{Phase, PodEffect, PodMachine, PodPlan, Role, Slot, container::creating, note};

impl PodMachine {
    /// Takes over what the spec now says of the containers that it had from the start.
    pub(super) fn change(&mut self, plan: PodPlan) {
        for slot in &mut self.slots {
            let image = plan.containers.iter().find(|new| new.name == slot.plan.name);
            if let Some(new) = image.filter(|new| new.image != slot.plan.image) {
                slot.change_image(new.image.clone());
            }
        }
        self.plan = plan;
    }
}

impl Slot {
    /// The next instance is of another image; one that is under way already is no longer wanted.
    pub(super) fn change_image(&mut self, image: Box<str>) {
        self.plan.image = image;
        // Back-offs are of the old image: upstream keys them by it too.
        self.forget_failures();
        match &mut self.phase {
            Phase::Pulling { .. } => self.outdated = true,
            Phase::Starting | Phase::Running(_) => self.outdated = self.plan.role != Role::Init,
            Phase::Waiting { since, until } => {
                (*since, *until) = (creating(), None);
            }
            Phase::PullFailed { .. } => {
                self.phase = Phase::Waiting { since: creating(), until: None };
            }
            Phase::Exited => {}
        }
    }

    /// A result that belongs to the old image: the new one is asked for instead.
    pub(super) fn begin_anew(&mut self) {
        self.outdated = false;
        self.phase = Phase::Waiting { since: creating(), until: None };
    }

    /// Asks an instance of the old image to end; `ended` then starts one of the new image.
    pub(super) fn replace(
        &mut self,
        index: usize,
        grace: Duration,
        now: Instant,
    ) -> Option<[PodEffect; 2]> {
        let stopping = self.running().is_none_or(super::Running::is_stopping);
        if !self.outdated || stopping {
            return None;
        }
        let name = &self.plan.name;
        let message = format!("Container {name} definition changed, will be restarted");
        Some([note(index, false, "Killing", message), self.stop(index, grace, now)?])
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};
    use crate::kubelet::pod::{ContainerHistory, History, Note, PodEvent, RestartPolicy};

    fn with_image(policy: RestartPolicy, image: &str) -> PodPlan {
        let mut main = container("a", Role::Main);
        main.image = image.into();
        plan(policy, vec![container("side", Role::Sidecar), main])
    }

    fn changed(image: &str) -> PodEvent {
        PodEvent::SpecChanged { plan: with_image(RestartPolicy::Never, image) }
    }

    fn waiting_for_image() -> Story {
        let mut story = Story::new(with_image(RestartPolicy::Never, "old"));
        story.tick();
        story.sandbox();
        story.start(0);
        story
    }

    #[test]
    fn a_new_image_replaces_the_instance_alone_and_also_where_nothing_is_restarted() {
        let mut story = waiting_for_image();
        let old = story.start(1);
        assert_eq!(story.tell_all(changed("old")), [], "nothing is new");
        let asked = story.tell_all(changed("new"));
        let note = Note {
            slot: Some(1),
            warning: false,
            reason: "Killing",
            message: "Container a definition changed, will be restarted".to_owned(),
        };
        let grace = Duration::from_secs(30);
        let stop = PodEffect::StopContainer { slot: 1, id: old.clone(), grace };
        assert_eq!(asked, [PodEffect::Record(note), stop]);
        assert_eq!(story.tell_all(changed("new")), [], "it was asked for already");
        assert_eq!(&*story.machine.slots()[1].image, "old", "what still runs");
        assert_eq!(story.exit(&old, 0), [PodEffect::PullImage { slot: 1 }]);
        let new = story.start(1);
        let slot = &story.machine.slots()[1];
        assert_eq!((slot.restart_count, &*slot.image), (1, "new"));
        assert!(story.machine.slots()[0].running().is_some(), "the sidecar stays");
        // From here on the policy counts again.
        let asked = story.exit(&new, 1);
        assert!(matches!(asked[..], [PodEffect::StopContainer { slot: 0, .. }]), "{asked:?}");
    }

    #[test]
    fn a_pull_or_start_under_way_is_of_no_use_for_another_image() {
        let pulled = || PodEvent::ImageReady { slot: 1, digest: String::new() };
        let mut story = waiting_for_image();
        assert_eq!(story.tell(changed("new")), []);
        assert_eq!(story.tell(pulled()), [PodEffect::PullImage { slot: 1 }]);
        let asked = story.tell(pulled());
        assert_eq!(asked, [PodEffect::StartContainer { slot: 1, restart_count: 0 }]);
        assert_eq!(story.tell(changed("newer")), []);
        let failed = PodEvent::StartFailed {
            slot: 1,
            reason: "RunContainerError",
            message: String::new(),
            instance: None,
        };
        assert_eq!(story.tell(failed), [PodEffect::PullImage { slot: 1 }], "without a pause");
        story.tell(pulled());
        assert_eq!(story.tell(changed("newest")), []);
        let id = crate::kubelet::runtime::ContainerId("late".into());
        let started = crate::kubelet::runtime::Started { pid: 1, at: jiff::Timestamp::UNIX_EPOCH };
        let asked = story.tell(PodEvent::Started { slot: 1, id, started });
        assert!(matches!(asked[..], [PodEffect::StopContainer { slot: 1, .. }]), "{asked:?}");
    }

    #[test]
    fn back_offs_of_the_old_image_end_and_what_has_ended_stays_so() {
        let mut story = waiting_for_image();
        let failed =
            PodEvent::ImageFailed { slot: 1, reason: "ErrImagePull", message: String::new() };
        assert_eq!(story.tell(failed), []);
        assert_eq!(story.tell(changed("new")), [PodEffect::PullImage { slot: 1 }]);

        let (mut story, mut id) = running_pod();
        story.exit(&id, 1);
        id = story.start(0);
        assert_eq!(story.exit(&id, 1), [], "it backs off");
        let mut new = plan(RestartPolicy::Always, vec![container("a", Role::Main)]);
        new.containers[0].image = "new".into();
        let asked = story.tell(PodEvent::SpecChanged { plan: new });
        assert_eq!(asked, [PodEffect::PullImage { slot: 0 }]);

        let mains = |image: &str| {
            let mut first = container("a", Role::Main);
            first.image = image.into();
            plan(RestartPolicy::Never, vec![first, container("b", Role::Main)])
        };
        let mut story = Story::new(mains("old"));
        story.tick();
        story.sandbox();
        let first = story.start(0);
        story.start(1);
        story.exit(&first, 0);
        assert_eq!(story.tell(PodEvent::SpecChanged { plan: mains("new") }), []);
        assert_eq!(&*story.machine.slots()[0].image, "old", "what ran last");
    }

    #[test]
    fn an_image_that_changed_while_no_agent_ran_is_seen_by_the_next_one() {
        let history = History {
            sandbox: Some(sandbox_with("a", "registry/image:0")),
            containers: Vec::<ContainerHistory>::new(),
            over: false,
        };
        let plan = plan(RestartPolicy::Never, vec![container("a", Role::Main)]);
        let mut story = Story::with(plan, &history);
        let asked = story.tick();
        assert!(matches!(asked[..], [PodEffect::StopContainer { slot: 0, .. }]), "{asked:?}");
    }
}
