package tune

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// errKilled is thrown where a process is killed.
var errKilled = errors.New("killed")

// mortal is a host and a journal that end the process before the step that brings
// left to zero; each step of a process is one of theirs.
type mortal struct {
	host
	write func(journal) error
	left  int
	steps []string
}

func (m *mortal) step(what string) {
	m.steps = append(m.steps, what)
	if m.left--; m.left == 0 {
		panic(errKilled)
	}
}

func (m *mortal) Write(name, value string) (string, error) {
	m.step("set " + name)
	got, err := m.host.Write(name, value)
	m.step("have set " + name)
	return got, err
}

func (m *mortal) save(j journal) error {
	m.step("write down")
	err := m.write(j)
	m.step("have written down")
	return err
}

// live runs one process that is killed before a step, 0 for never, and returns the
// steps that it came to.
func (m *machine) live(before int, act func(*Layer)) (steps []string) {
	m.Helper()
	l := New(m.Settings)
	body := &mortal{host: odd{l.host}, write: l.save, left: before}
	l.host, l.save = body, body.save
	defer func() {
		l.Close() // the kernel does that
		if died := recover(); died != nil && died != errKilled {
			panic(died)
		}
		steps = body.steps
	}()
	act(l)
	return nil
}

// works is a process that brings the settings to what is asked for.
func (m *machine) works(l *Layer) {
	m.must(l.Open())
	have, err := l.Read()
	m.must(err)
	want := l.Plan(nil)
	_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	m.must(err)
}

func (m *machine) undoes(l *Layer) {
	_, err := l.Remove()
	m.must(err)
}

// ask is a wish at random.
func ask() (c model.Conntrack) {
	maybe := func(d time.Duration) time.Duration { return d * time.Duration(rand.IntN(2)) }
	return model.Conntrack{
		MaxPerCore: int64(rand.IntN(2)) * 65601, Min: int64(rand.IntN(200000)), TCPBeLiberal: rand.IntN(2) == 0,
		TCPEstablished: maybe(24 * time.Hour), TCPCloseWait: maybe(time.Duration(1+rand.IntN(2)) * time.Hour),
		UDP: maybe(time.Duration(20+rand.IntN(20)) * time.Second), UDPStream: maybe(200 * time.Second),
	}
}

// Processes with wishes at random, each killed before a step at random or not at all,
// and one that undoes it all, which is killed, too: each value is as it was. The
// kernel rounds and alters some.
func TestKilledAtAnyStep(t *testing.T) {
	kills := map[string]int{}
	for run := range 400 {
		m := newMachine(t, model.Conntrack{})
		m.must(os.MkdirAll(m.Folder, 0o700))
		for range 1 + rand.IntN(4) {
			m.Conntrack = ask()
			before := rand.IntN(30)
			if steps := m.live(before, m.works); len(steps) > 0 && len(steps) == before {
				kills[steps[before-1]]++
			}
		}
		for range rand.IntN(3) {
			before := 1 + rand.IntN(15)
			if steps := m.live(before, m.undoes); len(steps) == before {
				kills["undo: "+steps[before-1]]++
			}
		}
		m.live(0, m.undoes)
		if got := m.is(); got != "" {
			t.Fatalf("run %d: after the undoing %s", run, got)
		}
	}
	t.Logf("%d kinds of moments to be killed at", len(kills))
	for _, what := range []string{"write down", "have written down", "set " + tcpCloseWait, "have set " + tcpCloseWait, "have set " + buckets, "have set " + udp, "undo: have set " + tcpEstablished} {
		if kills[what] == 0 {
			t.Errorf("no process was killed before the step %q: %v", what, kills)
		}
	}
}

// Each step in turn: killed before it, then undone; and killed before it, then gone on with.
func TestKilledAtEachStep(t *testing.T) {
	for before := 1; ; before++ {
		m := newMachine(t, everything)
		steps := m.live(before, m.works)
		m.live(0, m.undoes)
		if got := m.is(); got != "" {
			t.Errorf("killed before step %d, undone: %s", before, got)
		}
		m.live(before, m.works)
		m.live(0, m.works)
		m.wants(strings.Replace(allSet, ", udp_timeout 40", "", 1)) // the odd kernel has another
		m.live(0, m.undoes)
		if got := m.is(); got != "" {
			t.Errorf("killed before step %d, gone on with, undone: %s", before, got)
		}
		if len(steps) < before {
			t.Logf("%d steps", len(steps))
			return
		}
	}
}

// A killed process may leave half a journal beside the whole one.
func TestHalfAJournalIsNoJournal(t *testing.T) {
	m := newMachine(t, everything)
	m.live(0, m.works)
	m.must(os.WriteFile(filepath.Join(m.Folder, journalName+".new"), []byte(`{"bo`), 0o600))
	m.live(0, m.undoes)
	m.wants("")
	if _, err := os.Stat(m.Folder); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
}

// The test binary sets and puts back without end when this names its folders, until
// it is killed.
const restless = "MILLRACE_TEST_RESTLESS"

func TestMain(m *testing.M) {
	if folders := os.Getenv(restless); folders != "" {
		path, folder, _ := strings.Cut(folders, ":")
		fmt.Println(neverRest(Settings{From: "test", Tree: sysctl.Tree{Root: "/proc/sys", Netns: path}, Folder: folder}))
		os.Exit(1)
	}
	if words := os.Getenv(scribe); words != "" {
		fmt.Println(scribble(words))
		os.Exit(1)
	}
	os.Setenv("TMPDIR", "/dev/shm") // the run folder is in memory, too: no disk to wait for
	os.Exit(m.Run())
}

func neverRest(s Settings) error {
	for {
		s.Conntrack = ask()
		s.Conntrack.MaxPerCore = 0 // of the whole machine
		l := New(s)
		if err := l.Open(); err != nil {
			return err
		}
		have, err := l.Read()
		if err != nil {
			return err
		}
		want := l.Plan(nil)
		if _, _, err := l.Apply(have, want, l.Diff(have, want, true)); err != nil {
			return err
		}
		l.Close()
	}
}

// The same with processes and SIGKILL, at whatever instruction they are, and with the
// settings of a real network namespace: to write a file takes two steps, which a
// setting does not.
func TestProcessKilledAtAnyMoment(t *testing.T) {
	bed := layertest.NewBed(t)
	m := newMachine(t, model.Conntrack{})
	m.Tree = sysctl.Tree{Root: "/proc/sys", Netns: bed.NetNS}
	m.before = map[string]string{}
	for name := range fresh {
		value, err := m.Tree.Read(name)
		if err != nil {
			t.Skip(err)
		}
		m.before[name] = value
	}
	changed := 0
	for run := range 100 {
		process := exec.Command(os.Args[0])
		process.Env = append(os.Environ(), restless+"="+m.Tree.Netns+":"+m.Folder)
		m.must(process.Start())
		for deadline := time.Now().Add(10 * time.Second); m.is() == "" && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond)
		m.must(process.Process.Kill())
		if state, err := process.Process.Wait(); err != nil || state.Exited() {
			t.Fatalf("run %d: it ended by itself: %v, %v", run, state, err)
		}
		if m.is() != "" {
			changed++
		}
		m.live(0, m.undoes)
		if got := m.is(); got != "" {
			t.Fatalf("run %d: after the undoing %s", run, got)
		}
	}
	if t.Logf("%d of 100 left something to undo", changed); changed < 50 {
		t.Error("too few: the test is blind")
	}
}
