package tune

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
)

const (
	queueLength = "net.core.somaxconn"
	synLength   = "net.ipv4.tcp_max_syn_backlog"
	ports       = "net.ipv4.ip_local_port_range"
	reserved    = "net.ipv4.ip_local_reserved_ports"
)

// desk is a ledger, the places that it knows, and what their settings were.
type desk struct {
	*testing.T
	*Ledger
	all    []Place
	before map[Place]map[string]string
}

// newDesk is on a kernel that is a folder of ordinary files.
func newDesk(t *testing.T) *desk {
	t.Helper()
	cookie, err := netns.Cookie("")
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{T: t, all: []Place{{Name: "node", Cookie: cookie, Node: true}}, before: map[Place]map[string]string{}}
	d.Ledger = NewLedger(filepath.Join(t.TempDir(), "tune"), t.TempDir(), d.list)
	d.before[d.all[0]] = map[string]string{queueLength: "128", synLength: "512", ports: "32768 60999", reserved: "", mostTracked: "65536", buckets: "16384"}
	for name, value := range d.before[d.all[0]] {
		d.plant(name, value)
	}
	return d
}

// newDeskInside is in network namespaces of the test's own.
func newDeskInside(t *testing.T, names ...string) *desk {
	t.Helper()
	d := &desk{T: t, before: map[Place]map[string]string{}}
	for _, name := range names {
		bed := filepath.Join(t.TempDir(), name)
		if os.Geteuid() != 0 {
			t.Skip("needs root: makes network namespaces")
		}
		if err := netns.Create(bed); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netns.Remove(bed) })
		cookie, err := netns.Cookie(bed)
		if err != nil {
			t.Fatal(err)
		}
		p := Place{Name: name, Path: bed, Cookie: cookie}
		d.all = append(d.all, p)
		d.before[p] = map[string]string{}
		for _, setting := range []string{queueLength, synLength, ports, reserved} {
			value, err := at("/proc/sys", bed).Read(setting)
			if err != nil {
				t.Fatal(err)
			}
			d.before[p][setting] = value
		}
	}
	d.Ledger = NewLedger(filepath.Join(t.TempDir(), "tune"), "/proc/sys", d.list)
	return d
}

func (d *desk) list() ([]Place, error) { return d.all, nil }

func (d *desk) plant(name, value string) {
	d.Helper()
	file := filepath.Join(d.root, strings.ReplaceAll(name, ".", "/"))
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(value+"\n"), 0o644)); err != nil {
		d.Fatal(err)
	}
}

// is says what differs from the values at first.
func (d *desk) is() string {
	d.Helper()
	var text []string
	for _, p := range d.all {
		for _, name := range slices.Sorted(maps.Keys(d.before[p])) {
			value, err := at(d.root, p.Path).Read(name)
			if err != nil {
				value = err.Error()
			}
			if value != d.before[p][name] {
				text = append(text, fmt.Sprintf("%s %s %s", p.Name, name, value))
			}
		}
	}
	return strings.Join(text, ", ")
}

func (d *desk) wants(want string) {
	d.Helper()
	if got := d.is(); got != want {
		d.Errorf("the settings differ from the first ones in %q, want %q", got, want)
	}
}

// to is the step from what a setting is now to a value.
func (d *desk) to(p Place, id, setting, value string) Step {
	d.Helper()
	now, err := at(d.root, p.Path).Read(setting)
	if err != nil {
		d.Fatal(err)
	}
	return Step{ID: id, Place: p, Setting: setting, From: now, To: value}
}

func (d *desk) apply(steps ...Step) {
	d.Helper()
	if _, err := d.Apply(steps); err != nil {
		d.Fatal(err)
	}
}

// undoes all, and leaves no folder.
func (d *desk) undoes(want ...string) {
	d.Helper()
	done, err := d.Undo(nil, false)
	if err != nil {
		d.Fatal(err)
	}
	var got []string
	for _, change := range done {
		got = append(got, change.String())
	}
	if !slices.Equal(got, want) {
		d.Errorf("undone\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if _, err := os.Stat(d.folder); !errors.Is(err, os.ErrNotExist) {
		d.Errorf("the folder is left: %v", err)
	}
}

func TestLedgerSetsAndPutsBack(t *testing.T) {
	d := newDesk(t)
	node := d.all[0]
	d.apply(d.to(node, "accept-queue", queueLength, "4096"), d.to(node, "syn-backlog", synLength, "4096"))
	d.wants("node net.core.somaxconn 4096, node net.ipv4.tcp_max_syn_backlog 4096")
	d.apply(d.to(node, "accept-queue", queueLength, "8192"))
	held, err := d.Load()
	if err != nil || len(held) != 2 || held[1].Setting != queueLength || held[1].Before != "128" || held[1].Wrote != "8192" {
		t.Errorf("held: %+v, %v; what was before the first time is what counts", held, err)
	}
	if done, err := d.Undo([]string{"syn-backlog"}, true); err != nil || len(done) != 1 {
		t.Errorf("dry: %v, %v", done, err)
	}
	d.wants("node net.core.somaxconn 8192, node net.ipv4.tcp_max_syn_backlog 4096")
	if done, err := d.Undo([]string{"syn-backlog"}, false); err != nil || len(done) != 1 {
		t.Errorf("%v, %v", done, err)
	}
	d.wants("node net.core.somaxconn 8192")
	d.undoes("- net.core.somaxconn 8192 -> 128 (node, accept-queue)")
	d.wants("")
	d.undoes()
}

// What somebody else has set since is theirs.
func TestLedgerLeavesWhatIsOthers(t *testing.T) {
	d := newDesk(t)
	d.apply(d.to(d.all[0], "accept-queue", queueLength, "4096"))
	d.plant(queueLength, "1000")
	states, err := d.Status()
	if err != nil || len(states) != 1 || states[0].Now != "1000" || !strings.Contains(states[0].Drift, "it was set to 4096, and somebody has set it to 1000 since") {
		t.Errorf("%+v, %v", states, err)
	}
	d.undoes("- net.core.somaxconn stays 1000: it was 128 before millrace set it to 4096, and somebody else has set it since (node, accept-queue)")
	d.wants("node net.core.somaxconn 1000")
}

// stiff is a host with a setting that cannot be set, or of which the kernel makes
// something else.
type stiff struct {
	host
	setting, becomes string
	err              error
}

func (s stiff) Write(name, value string) (string, error) {
	if name != s.setting {
		return s.host.Write(name, value)
	}
	if s.err != nil {
		return "", fmt.Errorf("set %s to %s: %w", name, value, s.err)
	}
	if number(value) <= number(s.becomes) {
		return s.host.Write(name, value)
	}
	_, err := s.host.Write(name, s.becomes)
	return s.becomes, errors.Join(err, fmt.Errorf("set %s to %s: %w", name, value, &sysctl.Clamped{Wanted: value, Got: s.becomes}))
}

// An error, whichever, leaves nothing half done, and names object, cause and place.
func TestLedgerDoesAllOrNothing(t *testing.T) {
	for _, row := range []struct {
		what string
		host stiff
		says string
	}{
		{"the kernel refuses", stiff{setting: mostTracked, err: sysctl.ErrRefused}, "node: set net.netfilter.nf_conntrack_max to 131072: the kernel refuses this value: nothing was changed"},
		{"read-only", stiff{setting: synLength, err: sysctl.ErrReadOnly}, "set net.ipv4.tcp_max_syn_backlog to 4096: the file system is read-only"},
		{"clamped below", stiff{setting: mostTracked, becomes: "100000"}, "set net.netfilter.nf_conntrack_max to 131072: the kernel made 100000 of it: nothing was changed"},
	} {
		d := newDesk(t)
		row.host.host = at(d.root, "")
		d.open = func(string) host { return row.host }
		steps := []Step{d.to(d.all[0], "a", queueLength, "4096"), d.to(d.all[0], "b", synLength, "4096"), d.to(d.all[0], "c", mostTracked, "131072")}
		steps[2].AtLeast = true
		done, err := d.Apply(steps)
		if err == nil || !strings.Contains(err.Error(), row.says) || len(done) > 0 {
			t.Errorf("%s: %v, %v; want %q", row.what, done, err, row.says)
		}
		d.wants("")
		if _, err := os.Stat(d.folder); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the folder is left: %v", row.what, err)
		}
	}
}

// A size that is rounded up is as good as what was asked for.
func TestLedgerTakesMore(t *testing.T) {
	d := newDesk(t)
	d.open = func(path string) host { return odd{at(d.root, path)} }
	s := d.to(d.all[0], "conntrack-lists", buckets, "30000")
	s.AtLeast = true
	d.apply(s)
	if held, err := d.Load(); err != nil || len(held) != 1 || held[0].Wrote != "30208" {
		t.Errorf("held: %+v, %v", held, err)
	}
	d.undoes("- net.netfilter.nf_conntrack_buckets 30208 -> 16384 (node, conntrack-lists)")
	d.wants("")
}

// The kernel of a real namespace makes something else of a list of ports than was asked for:
// that is told, and what was set before it is put back.
func TestLedgerOfAValueThatTheKernelAlters(t *testing.T) {
	d := newDeskInside(t, "one")
	steps := []Step{d.to(d.all[0], "accept-queue", queueLength, "5000"), d.to(d.all[0], "local-ports", reserved, "8081,8080")}
	_, err := d.Apply(steps)
	if err == nil || !strings.Contains(err.Error(), "one: set net.ipv4.ip_local_reserved_ports to 8081,8080: the kernel made 8080-8081 of it: nothing was changed") {
		t.Errorf("%v", err)
	}
	d.wants("")
	steps[1].To = "nonsense"
	if _, err := d.Apply(steps); !errors.Is(err, sysctl.ErrRefused) {
		t.Errorf("%v", err)
	}
	d.wants("")
	d.undoes()
}

// A missing key, and a value that changed since it was planned.
func TestLedgerChecksBeforeItWrites(t *testing.T) {
	d := newDesk(t)
	s := d.to(d.all[0], "accept-queue", queueLength, "4096")
	d.plant(queueLength, "500")
	if _, err := d.Apply([]Step{s}); err == nil || !strings.Contains(err.Error(), `was "128" when this was planned, and is "500" now`) {
		t.Errorf("%v", err)
	}
	s.Setting = "net.core.absent"
	if _, err := d.Apply([]Step{s}); !errors.Is(err, sysctl.ErrAbsent) {
		t.Errorf("%v", err)
	}
	d.wants("node net.core.somaxconn 500")
	if _, err := os.Stat(d.folder); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
}

// A read-only /proc/sys, as in a container without privileges.
func TestLedgerOnAReadOnlyFileSystem(t *testing.T) {
	d := newDesk(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	if err := unix.Mount(d.root, d.root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(d.root, unix.MNT_DETACH) })
	if err := unix.Mount("", d.root, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err := d.Apply([]Step{d.to(d.all[0], "accept-queue", queueLength, "4096")})
	if !errors.Is(err, sysctl.ErrReadOnly) {
		t.Errorf("%v", err)
	}
	d.wants("")
	if held, err := d.Load(); err != nil || len(held) > 0 {
		t.Errorf("held: %v, %v", held, err)
	}
}

// Two at once: one is refused, and changes nothing.
func TestTwoLedgersAtOnce(t *testing.T) {
	d := newDesk(t)
	lock, err := d.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Apply([]Step{d.to(d.all[0], "accept-queue", queueLength, "4096")}); !errors.Is(err, layer.ErrInUse) {
		t.Errorf("apply: %v", err)
	}
	if _, err := d.Undo(nil, false); !errors.Is(err, layer.ErrInUse) {
		t.Errorf("undo: %v", err)
	}
	lock.Close()
	d.wants("")
	d.apply(d.to(d.all[0], "accept-queue", queueLength, "4096"))
	d.undoes("- net.core.somaxconn 4096 -> 128 (node, accept-queue)")
}

// A namespace that is bound elsewhere is found by its cookie; one that has gone took its
// settings along.
func TestLedgerFindsNamespacesAgain(t *testing.T) {
	d := newDeskInside(t, "moved", "gone")
	d.apply(d.to(d.all[0], "accept-queue", queueLength, "5000"), d.to(d.all[1], "accept-queue", queueLength, "5000"))
	moved := d.all[0].Path + "-elsewhere"
	if err := errors.Join(os.WriteFile(moved, nil, 0o600), unix.Mount(d.all[0].Path, moved, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(moved) })
	for _, p := range d.all {
		if err := netns.Remove(p.Path); err != nil {
			t.Fatal(err)
		}
	}
	was := d.before[d.all[0]]
	d.all = []Place{{Name: "moved", Path: moved, Cookie: d.all[0].Cookie}}
	d.before = map[Place]map[string]string{d.all[0]: was}
	d.undoes("- net.core.somaxconn has gone with its namespace (gone, accept-queue)", "- net.core.somaxconn 5000 -> 4096 (moved, accept-queue)")
	d.wants("")
}

// random steps in random places; what goes together goes together.
func (d *desk) random() (steps []Step) {
	for _, p := range d.all {
		if rand.IntN(4) > 0 {
			steps = append(steps, d.to(p, "accept-queue", queueLength, fmt.Sprint(1000+rand.IntN(9000))))
		}
		if rand.IntN(2) > 0 {
			steps = append(steps, d.to(p, "syn-backlog", synLength, fmt.Sprint(1000+rand.IntN(9000))))
		}
		if rand.IntN(2) > 0 {
			steps = append(steps, d.to(p, "local-ports", reserved, fmt.Sprintf("8080,%d-32767", 30000+rand.IntN(1000))),
				d.to(p, "local-ports", ports, fmt.Sprintf("%d 60999", 10000+2*rand.IntN(5000))))
		}
	}
	return steps
}

// ends is a Ledger that ends the process before a step.
func (d *desk) ends(before int, act func(*Ledger)) (steps []string) {
	d.Helper()
	l := NewLedger(d.folder, d.root, d.list)
	body := &mortal{left: before}
	open := l.open
	l.open = func(path string) host { return &hand{open(path), body} }
	save := l.save
	l.save = func(all []Held) error {
		body.step("write down")
		err := save(all)
		body.step("have written down")
		return err
	}
	defer func() {
		if died := recover(); died != nil && died != errKilled {
			panic(died)
		}
		steps = body.steps
	}()
	act(l)
	return nil
}

// hand is a host whose owner may be killed before or after a write.
type hand struct {
	host
	body *mortal
}

func (h *hand) Write(name, value string) (string, error) {
	h.body.step("set " + name)
	got, err := h.host.Write(name, value)
	h.body.step("have set " + name)
	return got, err
}

// In real namespaces: killed before each step in turn, and at random ones of several
// processes after each other, then undone: each value is as it was. An undoing that is
// killed is gone on with by the next.
func TestLedgerKilledAtAnyStep(t *testing.T) {
	d := newDeskInside(t, "one", "two")
	kills := map[string]int{}
	try := func(before int, act func(*Ledger)) bool {
		steps := d.ends(before, act)
		if before > 0 && len(steps) == before {
			kills[steps[before-1]]++
			return true
		}
		return false
	}
	apply := func(steps []Step) func(*Ledger) { return func(l *Ledger) { l.Apply(steps) } }
	undo := func(l *Ledger) { l.Undo(nil, false) }
	for before := 1; ; before++ {
		killed := try(before, apply(d.random()))
		d.ends(0, undo)
		if got := d.is(); got != "" {
			t.Fatalf("killed before step %d, undone: %s", before, got)
		}
		if !killed && before > 30 {
			break
		}
	}
	for run := range 100 {
		for range 1 + rand.IntN(3) {
			try(rand.IntN(20), apply(d.random()))
		}
		for range rand.IntN(3) {
			try(1+rand.IntN(8), undo)
		}
		d.ends(0, undo)
		if got := d.is(); got != "" {
			t.Fatalf("run %d: after the undoing %s", run, got)
		}
	}
	for _, what := range []string{"write down", "have written down", "set " + queueLength, "have set " + queueLength, "set " + ports, "have set " + reserved} {
		if kills[what] == 0 {
			t.Errorf("no process was killed before the step %q: %v", what, kills)
		}
	}
	t.Logf("killed %v", kills)
}

// The same with processes and SIGKILL, at whatever instruction they are.
func TestLedgerOfAKilledProcess(t *testing.T) {
	d := newDeskInside(t, "one", "two")
	changed := 0
	for run := range 100 {
		process := exec.Command(os.Args[0])
		process.Env = append(os.Environ(), scribe+"="+d.folder+":"+d.all[0].Path+":"+d.all[1].Path)
		if err := process.Start(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); d.is() == "" && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond)
		if err := process.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if state, err := process.Process.Wait(); err != nil || state.Exited() {
			t.Fatalf("run %d: it ended by itself: %v, %v", run, state, err)
		}
		if d.is() != "" {
			changed++
		}
		if _, err := d.Undo(nil, false); err != nil {
			t.Fatal(err)
		}
		if got := d.is(); got != "" {
			t.Fatalf("run %d: after the undoing %s", run, got)
		}
	}
	if t.Logf("%d of 100 left something to undo", changed); changed < 50 {
		t.Error("too few: the test is blind")
	}
}

// scribe makes the test binary apply and undo without end in these namespaces.
const scribe = "MILLRACE_TEST_SCRIBE"

func scribble(words string) error {
	parts := strings.Split(words, ":")
	d := &desk{T: &testing.T{}}
	for _, path := range parts[1:] {
		cookie, err := netns.Cookie(path)
		if err != nil {
			return err
		}
		d.all = append(d.all, Place{Name: filepath.Base(path), Path: path, Cookie: cookie})
	}
	d.Ledger = NewLedger(parts[0], "/proc/sys", d.list)
	for {
		if _, err := d.Apply(d.random()); err != nil {
			return err
		}
		if rand.IntN(4) == 0 {
			if _, err := d.Undo([]string{"local-ports"}, false); err != nil {
				return err
			}
		}
	}
}

// board is a Store: an object with fields, of which there may be another later.
type board struct {
	number uint64
	fields map[string]string
	// refuse is why nothing can be written.
	refuse error
}

func (b *board) Number() (uint64, error) {
	if b.fields == nil {
		return 0, os.ErrNotExist
	}
	return b.number, nil
}

func (b *board) Read(name string) (string, error) { return b.fields[name], nil }

func (b *board) Write(name, value string) (string, error) {
	if b.refuse != nil && value != "null" {
		return "", b.refuse
	}
	b.fields[name] = value
	return value, nil
}

// Of an object of a cluster all holds that holds of a host, but that it outlives boots;
// where another is found, in another cluster or made anew, it stays as it is, and so does
// what is written down.
func TestLedgerOfObjects(t *testing.T) {
	b := &board{7, map[string]string{"conntrack.min": "null", "mode": "ipvs"}, nil}
	folder := filepath.Join(t.TempDir(), "tune")
	open := func() *desk {
		return &desk{T: t, Ledger: NewLedgerOf(folder, func(path string) Store {
			if path != "kube:" {
				t.Errorf("opened %q", path)
			}
			return b
		})}
	}
	d := open()
	place := Place{Name: "ConfigMap kube-system/kube-proxy", Path: "kube:", Cookie: 7}
	step := Step{ID: "conntrack", Place: place, Setting: "conntrack.min", From: "null", To: "524288"}
	b.refuse = errors.New("forbidden")
	if _, err := d.Apply([]Step{step}); err == nil || err.Error() != "ConfigMap kube-system/kube-proxy: forbidden: nothing was changed" {
		t.Errorf("%v", err)
	}
	d.undoes()
	b.refuse = nil
	d.apply(step)
	if data, err := os.ReadFile(filepath.Join(folder, objectsName)); err != nil || strings.Contains(string(data), "boot") {
		t.Errorf("it is written down: %s, %v", data, err)
	}
	d = open()
	if states, err := d.Status(); err != nil || len(states) != 1 || states[0].Now != "524288" || states[0].Before != "null" || states[0].Drift != "" {
		t.Errorf("%+v, %v", states, err)
	}
	d.undoes("- conntrack.min 524288 -> null (ConfigMap kube-system/kube-proxy, conntrack)")
	if b.fields["conntrack.min"] != "null" || b.fields["mode"] != "ipvs" {
		t.Errorf("%v", b.fields)
	}
	d.apply(step)
	first, another := b.fields, map[string]string{"conntrack.min": "524288"}
	says := "conntrack.min of ConfigMap kube-system/kube-proxy, set by way of kube:: this leads to another cluster now, or its object was made anew or has gone: " +
		"what was set stays written down: name its cluster with --source kube:KUBECONFIG; if its object has gone for good, undo the rest and remove " + filepath.Join(folder, objectsName)
	for _, elsewhere := range []map[string]string{another, nil} { // nil: there is none of that name
		b.number, b.fields = 8, elsewhere
		if states, err := d.Status(); err != nil || len(states) != 1 || states[0].Drift != says || states[0].Gone || states[0].Before != "null" {
			t.Errorf("%+v, %v", states, err)
		}
		for _, dry := range []bool{true, false} {
			if done, err := d.Undo(nil, dry); err == nil || err.Error() != says || len(done) > 0 {
				t.Errorf("undo: %v, %v; want %s", done, err, says)
			}
		}
	}
	// What is set in that cluster meanwhile is put back by itself.
	b.fields = another
	there := step
	there.Place.Cookie, there.From, there.To = 8, "524288", "1048576"
	d.apply(there)
	if done, err := d.Undo([]string{"conntrack"}, false); err == nil || err.Error() != says || len(done) != 1 || another["conntrack.min"] != "524288" {
		t.Errorf("%v, %v: %v", done, err, another)
	}
	b.number, b.fields = 7, first
	d.undoes("- conntrack.min 524288 -> null (ConfigMap kube-system/kube-proxy, conntrack)")
	if b.fields["conntrack.min"] != "null" || another["conntrack.min"] != "524288" {
		t.Errorf("%v; that of another object: %v", b.fields, another)
	}
	// A process is killed between what it writes down and what it writes.
	b.number, b.fields["conntrack.min"] = 7, "null"
	for _, written := range []bool{false, true} {
		d.Ledger.now = func() time.Time { return time.Unix(0, 0) }
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		next, err := d.intend(nil, []Step{step})
		if err == nil {
			err = d.save(next)
		}
		if err != nil {
			t.Fatal(err)
		}
		want := "- conntrack.min stays null, as it was before (ConfigMap kube-system/kube-proxy, conntrack)"
		if written {
			b.fields["conntrack.min"], want = "524288", "- conntrack.min 524288 -> null (ConfigMap kube-system/kube-proxy, conntrack)"
		}
		d = open()
		// What became of it is its own cluster's to tell; others are set meanwhile.
		b.number, b.fields, first = 8, another, b.fields
		d.apply(there)
		if done, err := d.Undo(nil, false); err == nil || len(done) != 1 {
			t.Errorf("%v, %v", done, err)
		}
		b.number, b.fields = 7, first
		d.undoes(want)
		if b.fields["conntrack.min"] != "null" {
			t.Errorf("%v", b.fields)
		}
	}
}

// What an earlier step has set is set again when a later one is taken back, and is held
// with what was before it; what is set beside stays.
func TestLedgerTakesStepsBack(t *testing.T) {
	d := newDesk(t)
	node := d.all[0]
	d.apply(d.to(node, "accept-queue", queueLength, "4096"), d.to(node, "local-ports", ports, "20000 60999"))
	before, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	steps := []Step{d.to(node, "accept-queue", queueLength, "8192"), d.to(node, "syn-backlog", synLength, "2048")}
	d.apply(steps...)
	if err := d.TakeBack(steps, before); err != nil {
		t.Fatal(err)
	}
	d.wants("node net.core.somaxconn 4096, node net.ipv4.ip_local_port_range 20000 60999")
	after, err := d.Load()
	byName := func(a, b Held) int { return strings.Compare(a.Setting, b.Setting) }
	slices.SortFunc(before, byName)
	slices.SortFunc(after, byName)
	if err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("held:\n%+v, %v\nwant\n%+v", after, err, before)
	}
	d.undoes("- net.core.somaxconn 4096 -> 128 (node, accept-queue)", "- net.ipv4.ip_local_port_range 20000 60999 -> 32768 60999 (node, local-ports)")
	d.wants("")
	// Killed before any step, all is undone.
	killed := 0
	for before := 1; ; before++ {
		d.apply(d.to(node, "accept-queue", queueLength, "4096"))
		first, err := d.Load()
		if err != nil {
			t.Fatal(err)
		}
		steps = []Step{d.to(node, "accept-queue", queueLength, "8192"), d.to(node, "syn-backlog", synLength, "2048")}
		d.apply(steps...)
		gone := len(d.ends(before, func(l *Ledger) { err = l.TakeBack(steps, first) })) < before
		if _, failed := d.Undo(nil, false); failed != nil || gone && err != nil {
			t.Fatalf("killed before step %d: %v, %v", before, failed, err)
		}
		if got := d.is(); got != "" {
			t.Fatalf("killed before step %d, undone: %s", before, got)
		}
		if gone {
			break
		}
		killed++
	}
	if killed != 8 {
		t.Errorf("killed before %d steps, not before each of 2 settings and 2 writings down", killed)
	}
}
