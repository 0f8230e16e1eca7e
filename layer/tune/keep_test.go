package tune

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/tune/knob"
)

// kept is a desk with a Keeper, and a clock.
type keptDesk struct {
	*desk
	*Keeper
	clock time.Time
}

func newKept(d *desk) *keptDesk {
	k := &keptDesk{desk: d, Keeper: NewKeeper(d.Ledger), clock: time.Now()}
	d.now = func() time.Time { return k.clock }
	return k
}

// wish is what a knob proposes for a setting as it is now.
func (k *keptDesk) wish(p Place, wanted string) knob.Proposal {
	k.Helper()
	now := k.value(p)
	w := knob.Proposal{ID: "accept-queue", Setting: queueLength, Space: p.Name, Current: now, Wanted: wanted, AtLeast: true, Status: knob.Change}
	if knob.Suits(wanted, now, true) {
		w.Status = knob.Enough
	}
	return w
}

func (k *keptDesk) value(p Place) string {
	k.Helper()
	now, err := at(k.root, p.Path).Read(queueLength)
	if err != nil {
		k.Fatal(err)
	}
	return now
}

// keeps a round, and says what it came to: "set 1, held 1, refused 0, waiting 0, failed 0".
func (k *keptDesk) keeps(want string, more bool, proposals ...knob.Proposal) Kept {
	k.Helper()
	kept, err := k.Keep(k.all, proposals, more)
	if err != nil {
		k.Fatal(err)
	}
	var text []string
	for _, d := range kept.Drift {
		text = append(text, strings.TrimSpace(fmt.Sprintf("%s %s %s", d.Space, d.Now, d.Left)))
	}
	got := fmt.Sprintf("set %d, held %d, refused %d, waiting %d, failed %d, drift %q", len(kept.Set), kept.Held, len(kept.Refused), len(kept.Waiting), len(kept.Failed), text)
	if got != want {
		k.Errorf("it came to %s, not %s: %v", got, want, kept.Failed)
	}
	return kept
}

// What is planned is set once and stays; what somebody else sets is set again three times
// within ten minutes and is theirs then; a new process tries again; what was theirs last
// is put back.
func TestKeeper(t *testing.T) {
	k := newKept(newDesk(t))
	node := k.all[0]
	k.keeps(`set 0, held 0, refused 0, waiting 1, failed 0, drift []`, false, k.wish(node, "4096"))
	k.wants("")
	k.keeps(`set 1, held 1, refused 0, waiting 0, failed 0, drift []`, true, k.wish(node, "4096"))
	k.wants("node " + queueLength + " 4096")
	k.keeps(`set 0, held 1, refused 0, waiting 0, failed 0, drift []`, true, k.wish(node, "4096"))
	k.plant(queueLength, "8192") // more will do
	k.keeps(`set 0, held 1, refused 0, waiting 0, failed 0, drift []`, true, k.wish(node, "4096"))
	for range 3 {
		k.plant(queueLength, "100")
		k.clock = k.clock.Add(time.Minute)
		k.keeps(`set 1, held 1, refused 0, waiting 0, failed 0, drift ["node 100"]`, false, k.wish(node, "4096"))
		k.wants("node " + queueLength + " 4096")
	}
	k.plant(queueLength, "100")
	for range 2 {
		k.keeps(`set 0, held 0, refused 0, waiting 0, failed 0, drift ["node 100 it was set 3 times within 10m0s, and each time somebody set it otherwise again: now it is left to them"]`, true, k.wish(node, "4096"))
	}
	k.wants("node " + queueLength + " 100")
	k.Keeper = NewKeeper(k.Ledger)
	k.keeps(`set 1, held 1, refused 0, waiting 0, failed 0, drift ["node 100"]`, true, k.wish(node, "4096"))
	if held, err := k.Holds(); err != nil || len(held) != 1 || held[0].ID != "accept-queue" || held[0].Setting != queueLength {
		t.Errorf("it holds %+v, %v", held, err)
	}
	if changes, err := k.LetGo(func(h *Held) bool { return h.Setting == queueLength }); err != nil || len(changes) != 1 {
		t.Errorf("%v, %v", changes, err)
	}
	k.wants("node " + queueLength + " 100")
}

// Four times in more than ten minutes is no fight.
func TestKeeperHasPatience(t *testing.T) {
	k := newKept(newDesk(t))
	k.keeps(`set 1, held 1, refused 0, waiting 0, failed 0, drift []`, true, k.wish(k.all[0], "4096"))
	for range 6 {
		k.plant(queueLength, "100")
		k.clock = k.clock.Add(5 * time.Minute)
		k.keeps(`set 1, held 1, refused 0, waiting 0, failed 0, drift ["node 100"]`, false, k.wish(k.all[0], "4096"))
	}
}

// An owner is not fought at all, and what people have set is not a Keeper's.
func TestKeeperLeavesOwners(t *testing.T) {
	k := newKept(newDesk(t))
	node := k.all[0]
	k.apply(k.to(node, "syn-backlog", synLength, "2048"))
	k.keeps(`set 1, held 1, refused 0, waiting 0, failed 0, drift []`, true, k.wish(node, "4096"))
	k.plant(queueLength, "100")
	theirs := k.wish(node, "4096")
	theirs.Status, theirs.Owner, theirs.Reason = knob.Owned, "/etc/sysctl.d/1.conf", "ask who wrote it"
	kept := k.keeps(`set 0, held 0, refused 0, waiting 0, failed 0, drift ["node 100 ask who wrote it"]`, true, theirs)
	if kept.Drift[0].Who != "/etc/sysctl.d/1.conf" {
		t.Errorf("who: %+v", kept.Drift)
	}
	other := knob.Proposal{ID: "conntrack", Setting: mostTracked, Space: "node", Status: knob.Owned, Current: "65536"}
	k.keeps(`set 0, held 0, refused 1, waiting 0, failed 0, drift ["node 100 ask who wrote it"]`, true, theirs, other)
	if _, err := k.LetGo(func(*Held) bool { return true }); err != nil {
		t.Error(err)
	}
	k.wants("node " + queueLength + " 100, node " + synLength + " 2048")
}

// A namespace that cannot be set does not stop another; one that has ended is forgotten.
func TestKeeperOfNamespaces(t *testing.T) {
	k := newKept(newDeskInside(t, "one", "two"))
	one, two := k.all[0], k.all[1]
	bad := k.wish(one, "many")
	k.keeps(`set 1, held 1, refused 0, waiting 0, failed 1, drift []`, true, bad, k.wish(two, "8192"))
	k.keeps(`set 1, held 2, refused 0, waiting 0, failed 0, drift []`, true, k.wish(one, "8192"), k.wish(two, "8192"))
	k.wants("one " + queueLength + " 8192, two " + queueLength + " 8192")
	if err := netns.Remove(two.Path); err != nil {
		t.Fatal(err)
	}
	stale := two
	stale.Path = one.Path // a process of the one has the number that the other's had
	k.all = []Place{one, stale}
	k.keeps(`set 0, held 2, refused 0, waiting 0, failed 0, drift []`, true, k.wish(one, "8192"), k.wish(stale, "16384"))
	k.all = k.all[:1]
	if now := k.value(one); now != "8192" {
		t.Errorf("what was meant for another is set: %s", now)
	}
	k.keeps(`set 0, held 1, refused 0, waiting 0, failed 0, drift []`, false, k.wish(one, "8192"))
	if held, err := k.Load(); err != nil || len(held) != 1 || held[0].Space != "one" || !held[0].Kept {
		t.Errorf("it holds %+v, %v", held, err)
	}
}
