package tune

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// usual is what a kube-proxy asks for whose configuration says nothing.
var usual = model.Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablished: 24 * time.Hour, TCPCloseWait: time.Hour}

// everything asks for each setting.
var everything = model.Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablished: 24 * time.Hour, TCPCloseWait: time.Hour,
	UDP: 40 * time.Second, UDPStream: 200 * time.Second, TCPBeLiberal: true}

// fresh are the kernel's own values on a small machine.
var fresh = map[string]string{
	mostTracked: "65536", buckets: "16384", tcpEstablished: "432000", tcpCloseWait: "60",
	tcpBeLiberal: "0", udp: "30", udpStream: "120",
}

// machine is a kernel in a folder of ordinary files.
type machine struct {
	*testing.T
	Settings
	before map[string]string
}

func newMachine(t *testing.T, asked model.Conntrack) *machine {
	t.Helper()
	m := &machine{T: t, before: fresh, Settings: Settings{Conntrack: asked, From: "kube-proxy.conf", CPUs: 2,
		Tree: sysctl.Tree{Root: t.TempDir()}, Folder: filepath.Join(t.TempDir(), "tune")}}
	for name, value := range fresh {
		m.plant(name, value)
	}
	return m
}

func (m *machine) file(name string) string {
	return filepath.Join(m.Tree.Root, strings.ReplaceAll(name, ".", "/"))
}

// plant sets a setting as somebody else would.
func (m *machine) plant(name, value string) {
	m.Helper()
	file := m.file(name)
	m.must(errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(value+"\n"), 0o644)))
}

func (m *machine) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

// is says what differs from the values at first.
func (m *machine) is() string {
	m.Helper()
	var text []string
	for _, name := range slices.Sorted(maps.Keys(m.before)) {
		value, err := m.Tree.Read(name)
		if err != nil {
			value = "absent"
		}
		if value != m.before[name] {
			text = append(text, strings.TrimPrefix(name, conntrack)+" "+value)
		}
	}
	return strings.Join(text, ", ")
}

func (m *machine) wants(want string) {
	m.Helper()
	if got := m.is(); got != want {
		m.Errorf("the settings differ from the kernel's own in %q, want %q", got, want)
	}
}

// open is a new process with the layer open.
func (m *machine) open() *Layer {
	m.Helper()
	l := New(m.Settings)
	m.must(l.Open())
	m.Cleanup(func() { l.Close() })
	return l
}

// round is what an agent does once a minute.
func (m *machine) round(l *Layer) layer.Changes {
	m.Helper()
	have, err := l.Read()
	m.must(err)
	want := l.Plan(nil)
	_, done, err := l.Apply(have, want, l.Diff(have, want, true))
	m.must(err)
	return done
}

func (m *machine) removes(want ...string) {
	m.Helper()
	var got []string
	removed, err := New(m.Settings).Remove()
	m.must(err)
	for _, change := range removed {
		got = append(got, change.String())
	}
	if !slices.Equal(got, want) {
		m.Errorf("removed\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if _, err := os.Stat(m.Folder); !errors.Is(err, os.ErrNotExist) {
		m.Errorf("the folder is left: %v", err)
	}
}

const allSet = "buckets 32768, max 131072, tcp_be_liberal 1, tcp_timeout_close_wait 3600, tcp_timeout_established 86400, udp_timeout 40, udp_timeout_stream 200"

// The values are kube-proxy's (pkg/proxy/conntrack/sysctls.go of Kubernetes 1.36).
func TestPlanIsKubeProxys(t *testing.T) {
	for _, row := range []struct {
		asked model.Conntrack
		cpus  int
		want  string
	}{
		{model.Conntrack{}, 8, ""},
		{usual, 2, "buckets 32768 min, max 131072 min, tcp_timeout_close_wait 3600 tcpCloseWaitTimeout, tcp_timeout_established 86400 tcpEstablishedTimeout"},
		{model.Conntrack{MaxPerCore: 32768, Min: 131072}, 8, "buckets 65536 maxPerCore, max 262144 maxPerCore"},
		{model.Conntrack{MaxPerCore: 32768, Min: 131072}, 64, "buckets 262144 maxPerCore, max 1048576 maxPerCore"},
		{model.Conntrack{MaxPerCore: 32768, Min: 3000000}, 64, "buckets 750000 min, max 3000000 min"},
		{model.Conntrack{MaxPerCore: 1000}, 2, "buckets 500 maxPerCore, max 2000 maxPerCore"},
		{model.Conntrack{Min: 131072}, 2, ""},
		{model.Conntrack{TCPCloseWait: 90*time.Minute + 1500*time.Millisecond}, 2, "tcp_timeout_close_wait 5401 tcpCloseWaitTimeout"},
		{model.Conntrack{TCPBeLiberal: true, UDP: time.Second, UDPStream: time.Minute}, 2, "tcp_be_liberal 1 tcpBeLiberal, udp_timeout 1 udpTimeout, udp_timeout_stream 60 udpStreamTimeout"},
	} {
		var got []string
		for _, r := range plan(Settings{Conntrack: row.asked, CPUs: row.cpus, From: "F"}).rows {
			owner := strings.TrimSuffix(strings.TrimPrefix(r.Owner, "conntrack."), " of F")
			got = append(got, strings.TrimPrefix(r.Name, conntrack)+" "+r.Value+" "+owner)
		}
		if strings.Join(got, ", ") != row.want {
			t.Errorf("%+v with %d processors: %s; want %s", row.asked, row.cpus, strings.Join(got, ", "), row.want)
		}
	}
}

// unwell is a host of which a setting cannot be set.
type unwell struct {
	host
	victim string
}

func (u *unwell) Write(name, value string) (string, error) {
	if name == u.victim {
		return "", fmt.Errorf("set %s to %s: %w", name, value, syscall.ENOMEM)
	}
	return u.host.Write(name, value)
}

func TestPureLaws(t *testing.T) {
	m := newMachine(t, everything)
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(m.Settings) },
		Snapshots: []*model.Snapshot{{}, {Number: 2}},
		Nothing:   func() layer.Picture { return New(m.Settings).look(nil) },
		Faulty: func(object string) (layer.Layer, func()) {
			l := New(m.Settings)
			m.must(os.MkdirAll(m.Folder, 0o700))
			host := &unwell{l.host, object}
			l.host = host
			return l, func() { host.victim = "" }
		},
	})
}

// In a network namespace of the test's own, which has all settings but those of the
// whole machine.
func TestLaws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		bed := layertest.NewBed(t)
		asked := everything
		asked.MaxPerCore = 0
		settings := Settings{Conntrack: asked, From: "test", CPUs: 2, Tree: sysctl.Tree{Root: "/proc/sys", Netns: bed.NetNS}, Folder: filepath.Join(t.TempDir(), "tune")}
		if _, err := settings.Tree.Read(tcpCloseWait); err != nil {
			t.Skip(err)
		}
		observe := func() (text string) {
			for _, name := range append(slices.Sorted(maps.Keys(fresh)), conntrack+"icmp_timeout") {
				value, _ := settings.Tree.Read(name)
				text += name + " " + value + "\n"
			}
			return text
		}
		return layertest.Subject{
			New:       func() layer.Layer { return New(settings) },
			Snapshots: []*model.Snapshot{{Complete: true}, {Complete: true, Number: 2}},
			Observe:   observe,
			Stranger: func() func() error {
				if _, err := settings.Tree.Write(conntrack+"icmp_timeout", "17"); err != nil {
					t.Fatal(err)
				}
				return func() error {
					if value, err := settings.Tree.Read(conntrack + "icmp_timeout"); value != "17" {
						return fmt.Errorf("somebody else's setting is %q: %v", value, err)
					}
					return nil
				}
			},
			Works: func() error {
				if value, err := settings.Tree.Read(tcpCloseWait); value != "3600" {
					return fmt.Errorf("the timeout is %q: %v", value, err)
				}
				return nil
			},
		}
	})
}

func TestSetAndPutBack(t *testing.T) {
	m := newMachine(t, everything)
	l := m.open()
	if done := m.round(l); len(done) != 7 || done[3].String() != "~ net.netfilter.nf_conntrack_tcp_timeout_close_wait 60 -> 3600" {
		t.Errorf("done: %v", done)
	}
	m.wants(allSet)
	if done := m.round(l); len(done) > 0 {
		t.Errorf("again: %v", done)
	}
	d, err := l.Describe()
	want := layer.Value{Name: tcpCloseWait, Value: "3600", Before: "60", Owner: "conntrack.tcpCloseWaitTimeout of kube-proxy.conf"}
	if err != nil || len(d.Values) != 7 || d.Values[3] != want || d.Objects != 7 || len(d.Degraded) > 0 {
		t.Errorf("%+v, %v", d, err)
	}
	l.Close()
	m.removes("- net.netfilter.nf_conntrack_buckets 32768 -> 16384", "- net.netfilter.nf_conntrack_max 131072 -> 65536",
		"- net.netfilter.nf_conntrack_tcp_be_liberal 1 -> 0", "- net.netfilter.nf_conntrack_tcp_timeout_close_wait 3600 -> 60",
		"- net.netfilter.nf_conntrack_tcp_timeout_established 86400 -> 432000", "- net.netfilter.nf_conntrack_udp_timeout 40 -> 30",
		"- net.netfilter.nf_conntrack_udp_timeout_stream 200 -> 120")
	m.wants("")
}

// Without a wish nothing is written, and a value that suits is nobody's to put back.
func TestWhatSuitsIsNotTouched(t *testing.T) {
	m := newMachine(t, model.Conntrack{})
	l := m.open()
	if done := m.round(l); len(done) > 0 {
		t.Errorf("nobody asked: %v", done)
	}
	l.Close()
	m.removes()

	m = newMachine(t, everything)
	m.plant(mostTracked, "1000000") // more will do
	m.plant(buckets, "1000000")
	m.plant(tcpCloseWait, "3600")
	m.plant(tcpEstablished, "7200") // but a timeout is what is asked for
	l = m.open()
	m.round(l)
	l.Close()
	m.wants("buckets 1000000, max 1000000, tcp_be_liberal 1, tcp_timeout_close_wait 3600, tcp_timeout_established 86400, udp_timeout 40, udp_timeout_stream 200")
	m.removes("- net.netfilter.nf_conntrack_tcp_be_liberal 1 -> 0", "- net.netfilter.nf_conntrack_tcp_timeout_established 86400 -> 7200",
		"- net.netfilter.nf_conntrack_udp_timeout 40 -> 30", "- net.netfilter.nf_conntrack_udp_timeout_stream 200 -> 120")
	m.wants("buckets 1000000, max 1000000, tcp_timeout_close_wait 3600, tcp_timeout_established 7200")
}

// An agent that is started with another configuration puts back what it does not
// ask for any more, and remembers the first values of the rest.
func TestAnotherConfiguration(t *testing.T) {
	m := newMachine(t, everything)
	l := m.open()
	m.round(l)
	l.Close()
	m.Conntrack = model.Conntrack{TCPCloseWait: 2 * time.Hour, UDP: 30 * time.Second}
	l = m.open()
	have, err := l.Read()
	m.must(err)
	if changes := l.Diff(have, l.Plan(nil), false); len(changes) != 2 {
		t.Errorf("nothing may be put back before the cluster was seen whole: %v", changes)
	}
	m.round(l)
	m.wants("tcp_timeout_close_wait 7200")
	if d, _ := l.Describe(); len(d.Values) != 1 || d.Values[0].Before != "60" {
		t.Errorf("held: %v; one is what it was before, and not held", d.Values)
	}
	l.Close()
	m.Conntrack = model.Conntrack{}
	l = m.open()
	m.round(l)
	m.wants("")
	l.Close()
	m.removes()
}

// Somebody else's value is not ours to put back.
func TestSomebodyElsesValueStays(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour, UDP: 40 * time.Second})
	l := m.open()
	m.round(l)
	l.Close()
	m.plant(tcpCloseWait, "120")
	change, err := New(m.Settings).Removal()
	m.must(err)
	if !strings.HasPrefix(change[0].String(), "- net.netfilter.nf_conntrack_tcp_timeout_close_wait stays 120: it was 60 before millrace set it to 3600, and somebody else has set it since") {
		t.Errorf("told: %s", change[0])
	}
	m.removes(change[0].String(), "- net.netfilter.nf_conntrack_udp_timeout 40 -> 30")
	m.wants("tcp_timeout_close_wait 120")
}

// What somebody sets otherwise is set again, three times; then it is theirs.
func TestNoEndlessFight(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour, UDP: 40 * time.Second})
	l, now := m.open(), time.Now()
	l.now = func() time.Time { return now }
	m.round(l)
	disturb := func(value string) layer.Changes {
		m.plant(tcpCloseWait, value)
		now = now.Add(time.Minute)
		return m.round(l)
	}
	for i := range 2 {
		if done := disturb("120"); len(done) != 1 {
			t.Fatalf("time %d: %v", i+1, done)
		}
	}
	now = now.Add(time.Hour) // long ago is forgotten
	for i, value := range []string{"120", "60", "120"} {
		if done := disturb(value); len(done) != 1 {
			t.Fatalf("time %d: %v", i+1, done)
		}
	}
	for range 3 {
		if done := disturb("120"); len(done) > 0 {
			t.Fatalf("it goes on: %v", done)
		}
		now = now.Add(time.Hour)
	}
	m.wants("tcp_timeout_close_wait 120, udp_timeout 40")
	d, err := l.Describe()
	m.must(err)
	if len(d.Values) != 1 || len(d.Degraded) != 1 || !strings.HasPrefix(d.Degraded[0], "not as kube-proxy.conf asks: "+tcpCloseWait+": it was set to 3600 3 times within 10m0s, and each time somebody set it") {
		t.Errorf("held %v; degraded %q", d.Values, d.Degraded)
	}
	l.Close()
	m.removes("- net.netfilter.nf_conntrack_udp_timeout 40 -> 30")
	m.wants("tcp_timeout_close_wait 120")
}

// What was in force when a disturbance was mended is what is put back: it is what
// would be there without this layer.
func TestDisturberIsPutBack(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour})
	l := m.open()
	m.round(l)
	m.plant(tcpCloseWait, "120")
	m.round(l)
	l.Close()
	m.removes("- net.netfilter.nf_conntrack_tcp_timeout_close_wait 3600 -> 120")
}

// odd is a kernel that makes something else of some values.
type odd struct{ host }

func (o odd) Write(name, value string) (string, error) {
	kept := value
	switch {
	case name == buckets: // as nf_ct_alloc_hashtable does, a page at a time
		kept = fmt.Sprint((number(value) + 511) / 512 * 512)
	case name == udp && number(value) > 35:
		kept = "35"
	}
	if _, err := o.host.Write(name, kept); err != nil || kept == value {
		return kept, err
	}
	return kept, fmt.Errorf("set %s to %s: %w", name, value, &sysctl.Clamped{Wanted: value, Got: kept})
}

// A table that becomes larger than asked for will do; a timeout that becomes another
// is no timeout that somebody asked for.
func TestValueThatTheKernelAlters(t *testing.T) {
	m := newMachine(t, model.Conntrack{MaxPerCore: 65601, UDP: 40 * time.Second, UDPStream: time.Hour})
	l := m.open()
	l.host = odd{l.host}
	if done := m.round(l); len(done) != 3 {
		t.Errorf("done: %v", done)
	}
	m.wants("buckets 33280, max 131202, udp_timeout_stream 3600")
	d, err := l.Describe()
	m.must(err)
	if want := "not as kube-proxy.conf asks: " + udp + ": the kernel made 35 of it"; len(d.Values) != 3 || len(d.Degraded) != 1 || d.Degraded[0] != want {
		t.Errorf("held %v; degraded %q", d.Values, d.Degraded)
	}
	if done := m.round(l); len(done) > 0 {
		t.Errorf("again: %v", done)
	}
	l.Close()
	_, err = New(m.Settings).Remove()
	m.must(err)
	m.wants("")
}

// A container that was not given the node's settings, and a node without conntrack:
// one sentence, and nothing that would make the node seem ill.
func TestWhatCannotBeSetIsTold(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	m := newMachine(t, everything)
	m.Tree.Root = t.TempDir()
	m.must(unix.Mount("fake", m.Tree.Root, "tmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(m.Tree.Root, unix.MNT_DETACH) })
	for _, name := range []string{tcpCloseWait, tcpEstablished, tcpBeLiberal} {
		m.plant(name, fresh[name])
	}
	m.must(unix.Mount("fake", m.Tree.Root, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	l := m.open()
	for range 2 {
		if done := m.round(l); len(done) > 0 {
			t.Errorf("done: %v", done)
		}
	}
	d, err := l.Describe()
	m.must(err)
	want := []string{
		"not as kube-proxy.conf asks: " + strings.Join([]string{tcpBeLiberal, tcpCloseWait, tcpEstablished}, ", ") + ": " + sysctl.ErrReadOnly.Error(),
		"not as kube-proxy.conf asks: " + strings.Join([]string{buckets, mostTracked, udp, udpStream}, ", ") +
			": the kernel has no such setting: the module nf_conntrack is not loaded, so that no connections are tracked",
	}
	if slices.Sort(want); !slices.Equal(d.Degraded, want) || len(d.Values) > 0 {
		t.Errorf("held %v; degraded\n%s\nwant\n%s", d.Values, strings.Join(d.Degraded, "\n"), strings.Join(want, "\n"))
	}
	l.Close()
	m.removes()
	m.Conntrack = model.Conntrack{}
	l = m.open()
	m.round(l)
	if d, _ := l.Describe(); len(d.Degraded) > 0 {
		t.Errorf("nobody asked, and it is told: %q", d.Degraded)
	}
}

// A table for which there is no memory, for one, is tried a few times.
func TestFailureThatStaysIsTold(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour})
	l := m.open()
	l.host = &unwell{l.host, tcpCloseWait}
	have, err := l.Read()
	m.must(err)
	want := l.Plan(nil)
	failed := 0
	for len(l.Diff(have, want, true)) > 0 {
		if have, _, err = l.Apply(have, want, l.Diff(have, want, true)); err != nil {
			failed++
		}
	}
	d, _ := l.Describe()
	if want := "not as kube-proxy.conf asks: " + tcpCloseWait + ": cannot allocate memory"; failed != mostTries-1 || len(d.Degraded) != 1 || d.Degraded[0] != want {
		t.Errorf("failed %d times; degraded %q", failed, d.Degraded)
	}
	l.Close()
	m.removes()
}

// What is no longer asked for and cannot be put back is told as well.
func TestWhatCannotBePutBackIsTold(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour})
	l := m.open()
	m.round(l)
	l.Close()
	m.Conntrack = model.Conntrack{}
	l = m.open()
	l.host = deaf{l.host}
	m.round(l)
	d, _ := l.Describe()
	if want := "not as it was before millrace: " + tcpCloseWait + ": " + sysctl.ErrReadOnly.Error(); len(d.Degraded) != 1 || d.Degraded[0] != want {
		t.Errorf("degraded: %q", d.Degraded)
	}
	l.Close()
	m.removes("- net.netfilter.nf_conntrack_tcp_timeout_close_wait 3600 -> 60")
}

// deaf is a host of which nothing can be set.
type deaf struct{ host }

func (deaf) Write(name, value string) (string, error) {
	return "", fmt.Errorf("set %s to %s: %w", name, value, sysctl.ErrReadOnly)
}

// A setting that was not there when it was to be written down is not set: its value
// before would be lost.
func TestNothingIsSetThatIsNotWrittenDown(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour})
	l := m.open()
	have, err := l.Read()
	m.must(err)
	want := l.Plan(nil)
	l.host = &late{l.host, 1}
	if _, done, err := l.Apply(have, want, l.Diff(have, want, true)); err == nil || len(done) > 0 {
		t.Errorf("done: %v, %v", done, err)
	}
	m.wants("")
	m.round(l)
	m.wants("tcp_timeout_close_wait 3600")
	l.Close()
	m.removes("- net.netfilter.nf_conntrack_tcp_timeout_close_wait 3600 -> 60")
}

// late is a host on which nothing can be read for so many times.
type late struct {
	host
	times int
}

func (l *late) Read(name string) (string, error) {
	if l.times--; l.times >= 0 {
		return "", fmt.Errorf("read %s: %w", name, sysctl.ErrAbsent)
	}
	return l.host.Read(name)
}

// A module that is loaded later brings its settings.
func TestModuleThatIsLoadedLater(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour})
	m.must(os.Remove(m.file(tcpCloseWait)))
	l := m.open()
	m.round(l)
	m.plant(tcpCloseWait, "60")
	m.round(l)
	m.wants("tcp_timeout_close_wait 3600")
	if d, _ := l.Describe(); len(d.Degraded) > 0 {
		t.Errorf("degraded: %q", d.Degraded)
	}
	m.must(os.Remove(m.file(tcpCloseWait))) // and is unloaded
	if done := m.round(l); len(done) > 0 {
		t.Errorf("done: %v", done)
	}
	l.Close()
	m.removes()
}

// The settings of an earlier boot are gone, whatever a folder on a disk says.
func TestJournalOfAnotherBoot(t *testing.T) {
	m := newMachine(t, usual)
	m.must(os.MkdirAll(m.Folder, 0o700))
	m.must(os.WriteFile(filepath.Join(m.Folder, journalName), []byte(`{"boot": "another", "settings": [{"name": "`+tcpCloseWait+`", "before": "7", "wrote": "60"}]}`), 0o600))
	m.removes()
	m.wants("")
}

// Who removes it from another network namespace would set what is somebody else's.
func TestJournalOfAnotherNamespace(t *testing.T) {
	m := newMachine(t, model.Conntrack{TCPCloseWait: time.Hour})
	l := m.open()
	m.round(l)
	l.Close()
	bed := layertest.NewBed(t)
	there := m.Settings
	there.Tree.Netns = bed.NetNS
	for what, err := range map[string]error{"look": looked(New(there).Look()), "remove": removed(New(there).Remove()), "dry run": removed(New(there).Removal())} {
		if !errors.Is(err, errElsewhere) {
			t.Errorf("%s: %v", what, err)
		}
	}
	m.wants("tcp_timeout_close_wait 3600")
	m.removes("- net.netfilter.nf_conntrack_tcp_timeout_close_wait 3600 -> 60")
}

func TestDamagedJournalIsNamed(t *testing.T) {
	m := newMachine(t, usual)
	m.must(os.MkdirAll(m.Folder, 0o700))
	m.must(os.WriteFile(filepath.Join(m.Folder, journalName), []byte(`{"boot`), 0o600))
	for what, err := range map[string]error{"open": New(m.Settings).Open(), "look": looked(New(m.Settings).Look()), "remove": removed(New(m.Settings).Remove())} {
		if err == nil || !strings.Contains(err.Error(), filepath.Join(m.Folder, journalName)+": unexpected end of JSON input: remove the file") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func looked(_ layer.Picture, err error) error  { return err }
func removed(_ layer.Changes, err error) error { return err }
