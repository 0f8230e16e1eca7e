package dir

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/model"
)

// follower runs a Source over the current folder and collects its Snapshots.
type follower struct {
	t    testing.TB
	snap chan *model.Snapshot
	seen []*model.Snapshot
}

func watchOver(t testing.TB, path string) *follower {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, snap: make(chan *model.Snapshot, 100_000)}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx, func(s *model.Snapshot) { f.snap <- s }) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run ended with %v", err)
		}
	})
	return f
}

// until waits for a Snapshot that says all the words, and none of those that
// start with "no ".
func (f *follower) until(words ...string) *model.Snapshot {
	f.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		if len(f.seen) > 0 {
			if last := f.seen[len(f.seen)-1]; says(last, words) {
				return last
			}
		}
		select {
		case s := <-f.snap:
			if !s.Complete {
				f.t.Fatal("an incomplete Snapshot was delivered")
			}
			if n := len(f.seen); n > 0 && s.Number <= f.seen[n-1].Number {
				f.t.Fatalf("Snapshot %d came after %d", s.Number, f.seen[n-1].Number)
			}
			f.seen = append(f.seen, s)
		case <-deadline:
			last := "nothing"
			if len(f.seen) > 0 {
				last = dump(f.seen[len(f.seen)-1])
			}
			f.t.Fatalf("waited for %q and have\n%s", words, last)
		}
	}
}

func says(s *model.Snapshot, words []string) bool {
	text := dump(s)
	for _, w := range words {
		absent, not := strings.CutPrefix(w, "no ")
		if strings.Contains(text, absent) == not {
			return false
		}
	}
	return true
}

// always says that every Snapshot so far had the words.
func (f *follower) always(words ...string) {
	f.t.Helper()
	for _, s := range f.seen {
		if !says(s, words) {
			f.t.Fatalf("meanwhile there was not always %q, but\n%s", words, dump(s))
		}
	}
}

// svc is a Service in YAML.
func svc(name string, port int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {ports: [{port: %d}]}\n", name, port)
}

const next = "---\n"

func TestFilesChange(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1))
	write(t, "b.yaml", svc("b", 1)+next+svc("c", 1))
	f := watchOver(t, ".")
	first := f.until("a ClusterIP", "b ClusterIP", "c ClusterIP", "no problem")
	write(t, "d.json", `{"kind":"Service","apiVersion":"v1","metadata":{"name":"d"},"spec":{"ports":[{"port":1}]}}`)
	second := f.until("d ClusterIP")
	if first.Services[0] != second.Services[0] || first.Services[2] != second.Services[2] {
		t.Error("a Service whose file did not change is another one")
	}
	write(t, "a.yaml", svc("a", 77))
	f.until(`a ClusterIP`, "77/tcp")
	write(t, "b.yaml", svc("b", 1))
	f.until("no c ClusterIP", "b ClusterIP")
	if err := os.Remove("a.yaml"); err != nil {
		t.Fatal(err)
	}
	f.until("no a ClusterIP", "d ClusterIP")
	if err := os.Rename("b.yaml", "z.yaml"); err != nil {
		t.Fatal(err)
	}
	f.until("b ClusterIP", "no problem")
	f.always("b ClusterIP", "no problem")
}

func TestBrokenThenMended(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1)+next+svc("b", 1)+next+svc("c", 1))
	f := watchOver(t, ".")
	f.until("a ClusterIP", "b ClusterIP", "c ClusterIP")
	write(t, "a.yaml", svc("a", 2)+next+"kind: [Service\n"+next+svc("c", 1))
	f.until("2/tcp", "problem a.yaml:6")
	write(t, "a.yaml", "\xff\xfe")
	f.until("problem a.yaml:1: the file is not UTF-8")
	write(t, "a.yaml", svc("a", 2)+next+strings.Replace(svc("b", 1), "name: b", "name: B", 1)+next+svc("c", 1))
	f.until(`problem a.yaml:8: Service default/B: metadata.name: "B" is not a name`)
	f.always("a ClusterIP", "b ClusterIP", "c ClusterIP")
	write(t, "a.yaml", svc("a", 2)+next+svc("c", 1))
	f.until("no b ClusterIP", "no problem", "a ClusterIP", "c ClusterIP")
	f.always("no unread")
}

func TestUnreadThenMended(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1)+next+"kind: [")
	f := watchOver(t, ".")
	f.until("a ClusterIP", "unread 1")
	write(t, "a.yaml", svc("a", 1)+next+svc("b", 1))
	f.until("b ClusterIP", "no unread")
	write(t, "a.yaml", svc("a", 1)+next+"kind: [")
	f.until("b ClusterIP", "no unread", "problem")
	write(t, "x/c.yaml", svc("c", 0))
	f.until("unread 1")
	if err := os.RemoveAll("x"); err != nil {
		t.Fatal(err)
	}
	f.until("no unread")
}

func TestTwoFilesOneObject(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "b.yaml", svc("x", 2))
	f := watchOver(t, ".")
	f.until("2/tcp", "no problem")
	write(t, "a.yaml", svc("x", 1))
	f.until("1/tcp", "no 2/tcp", "problem b.yaml:1: Service default/x: metadata.name: is at a.yaml:1 already")
	write(t, "a.yaml", "kind: [")
	f.until("2/tcp", "no 1/tcp", "no is at", "problem a.yaml:1")
	if err := os.Remove("b.yaml"); err != nil {
		t.Fatal(err)
	}
	f.until("1/tcp", "no 2/tcp")
	if err := os.Remove("a.yaml"); err != nil {
		t.Fatal(err)
	}
	f.until("no service", "no problem")
}

func TestFoldersComeAndGo(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1))
	f := watchOver(t, ".")
	f.until("a ClusterIP")
	write(t, "x/y/b.yaml", svc("b", 1))
	f.until("b ClusterIP")
	write(t, "x/y/c.yaml", svc("c", 1))
	f.until("c ClusterIP")
	if err := os.Rename("x", "z"); err != nil {
		t.Fatal(err)
	}
	write(t, "z/y/b.yaml", svc("b", 2))
	write(t, "z/y/d.yaml", svc("d", 1))
	f.until("b ClusterIP", "2/tcp", "c ClusterIP", "d ClusterIP", "no problem")
	if err := os.RemoveAll("z"); err != nil {
		t.Fatal(err)
	}
	f.until("no b ClusterIP", "no c ClusterIP", "no d ClusterIP")
	write(t, ".git/e.yaml", svc("e", 1))
	write(t, "a.yaml", svc("a", 5))
	f.until("5/tcp")
	f.always("a ClusterIP", "no e ClusterIP")
}

// TestHalfWritten empties a file and fills it again in place. What it said must
// not vanish in between.
func TestHalfWritten(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1))
	f := watchOver(t, ".")
	f.until("a ClusterIP")
	file, err := os.Create("a.yaml")
	if err != nil {
		t.Fatal(err)
	}
	write(t, "b.yaml", svc("b", 1))
	f.until("b ClusterIP")
	if _, err := file.WriteString(svc("a", 22)); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	f.until("a ClusterIP", "22/tcp")
	f.always("a ClusterIP")
}

// TestHalfWrittenRoot removes the only file and writes it slowly anew, through
// each way that leads to it.
func TestHalfWrittenRoot(t *testing.T) {
	t.Chdir(t.TempDir())
	link(t, "shop.yaml", "link.yaml")
	for _, path := range []string{"shop.yaml", "link.yaml"} {
		t.Run(path, func(t *testing.T) {
			write(t, "shop.yaml", svc("a", 1))
			f := watchOver(t, path)
			f.until("a ClusterIP", "1/tcp", "no problem")
			if err := os.Remove("shop.yaml"); err != nil {
				t.Fatal(err)
			}
			f.until("problem " + path + ": ")
			file, err := os.Create("shop.yaml")
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			rescan(t, f, path)
			if _, err := file.WriteString(svc("a", 22) + next + svc("b", 22)); err != nil {
				t.Fatal(err)
			}
			if err := file.Close(); err != nil {
				t.Fatal(err)
			}
			f.until("a ClusterIP", "b ClusterIP", "22/tcp", "no problem")
			f.always("a ClusterIP", "no unread")
		})
	}
}

// rescan has a watched root that is missing or unfinished looked at, and waits
// until it was: the remark that it is missing goes.
func rescan(t *testing.T, f *follower, path string) {
	t.Helper()
	link(t, "nowhere", ".new")
	if err := os.Rename(".new", "..data"); err != nil {
		t.Fatal(err)
	}
	f.until("no problem " + path)
	if err := os.Remove("..data"); err != nil {
		t.Fatal(err)
	}
}

// begin empties or creates a file and writes half of it. What it returns writes
// the rest.
func begin(t *testing.T, path, content string) (finish func()) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	half := len(content) / 2
	if _, err := file.WriteString(content[:half]); err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := file.WriteString(content[half:]); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHalfWrittenWhileWalked has folders walked while files in them are emptied,
// half-written, known under a second name, or new.
func TestHalfWrittenWhileWalked(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "in/a.yaml", svc("a", 1)+next+svc("b", 1))
	write(t, "in/c.yaml", svc("c", 1))
	write(t, "far/d.yaml", svc("d", 1))
	link(t, "../far/d.yaml", "in/d.yaml")
	words := []string{"a ClusterIP", "b ClusterIP", "c ClusterIP", "d ClusterIP"}
	f := watchOver(t, "in")
	f.until(append(words, "no problem")...)
	a := begin(t, "in/a.yaml", svc("a", 22)+next+svc("b", 22))
	d := begin(t, "far/d.yaml", svc("d", 44))
	c, err := os.Create("in/c.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := os.Link("in/c.yaml", "in/sub.yaml"); err != nil {
		t.Fatal(err)
	}
	write(t, "out/m.yaml", svc("m", 1))
	if err := os.Rename("out", "in/sub"); err != nil {
		t.Fatal(err)
	}
	f.until(append(words, "m ClusterIP")...) // known from a walk alone
	a()
	d()
	f.until(append(words, "22/tcp", "44/tcp")...)
	f.always(words...)
	// c.yaml stays open and empty, so that it says nothing after all.
	f.until("no c ClusterIP", "no problem", "a ClusterIP", "b ClusterIP", "d ClusterIP")
}

// TestHalfWrittenAtStart begins with a file that is being written: a restart must
// not take it for all there is.
func TestHalfWrittenAtStart(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "b.yaml", svc("b", 1))
	f := watchOver(t, ".")
	f.until("b ClusterIP", "no unread")
	finish := begin(t, "a.yaml", svc("a", 1))
	write(t, ".out/m.yaml", svc("m", 1))
	if err := os.Rename(".out", "sub"); err != nil {
		t.Fatal(err)
	}
	f.until("m ClusterIP", "unread 1", "problem a.yaml: is being written")
	finish()
	f.until("a ClusterIP", "no unread", "no problem")
}

// TestEditorMovesAside saves as editors do that move the old file to a backup
// before they write the new one.
func TestEditorMovesAside(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1))
	f := watchOver(t, ".")
	f.until("a ClusterIP")
	for i := range 5 {
		if err := os.Rename("a.yaml", "a.yaml~"); err != nil {
			t.Fatal(err)
		}
		write(t, "b.yaml", svc("b", 100+i)) // so that a Snapshot comes in between
		f.until(fmt.Sprintf("%d/tcp", 100+i))
		if err := os.WriteFile("a.yaml", []byte(svc("a", 200+i)), 0o644); err != nil {
			t.Fatal(err)
		}
		f.until(fmt.Sprintf("%d/tcp", 200+i))
	}
	f.always("a ClusterIP", "no problem")
	if err := os.Rename("a.yaml", "a.yaml~"); err != nil {
		t.Fatal(err)
	}
	f.until("no a ClusterIP", "b ClusterIP")
}

// TestConfigMap changes a folder as kubelet changes a mounted ConfigMap.
func TestConfigMap(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "..1/a.yaml", svc("a", 1))
	link(t, "..1", "..data")
	link(t, "..data/a.yaml", "a.yaml")
	for _, path := range []string{".", "a.yaml"} {
		t.Run(path, func(t *testing.T) {
			f := watchOver(t, path)
			f.until("a ClusterIP", "1/tcp", "no problem")
			write(t, "..2/a.yaml", svc("a", 2))
			link(t, "..2", "..data_tmp")
			if err := os.Rename("..data_tmp", "..data"); err != nil {
				t.Fatal(err)
			}
			f.until("a ClusterIP", "2/tcp")
			f.always("a ClusterIP")
			link(t, "..1", "..data_tmp")
			if err := os.Rename("..data_tmp", "..data"); err != nil {
				t.Fatal(err)
			}
			f.until("a ClusterIP", "1/tcp")
		})
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func TestLinks(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "elsewhere/a.yaml", svc("a", 1))
	write(t, "far/b.yaml", svc("b", 1))
	if err := os.Mkdir("in", 0o755); err != nil {
		t.Fatal(err)
	}
	link(t, "../elsewhere/a.yaml", "in/a.yaml")
	link(t, "../far", "in/far")
	link(t, "..", "in/circle")
	link(t, "nowhere", "in/lost.yaml")
	f := watchOver(t, "in")
	f.until("a ClusterIP", "b ClusterIP", "problem in/lost.yaml: cannot be read")
	write(t, "elsewhere/a.yaml", svc("a", 2))
	f.until("2/tcp")
	write(t, "far/b.yaml", svc("b", 3))
	f.until("3/tcp")
	link(t, "../far/b.yaml", "in/0.yaml")
	f.until("/far/b.yaml:1: Service default/b: metadata.name: is at in/0.yaml:1 already")
}

// TestRootGone takes the whole path away, which is more likely a mistake than a
// wish to stop everything.
func TestRootGone(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "in/a.yaml", svc("a", 1))
	write(t, "one", svc("b", 1))
	for _, path := range []string{"in", "one"} {
		t.Run(path, func(t *testing.T) {
			f := watchOver(t, path)
			f.until("1/tcp", "no problem")
			if err := os.Rename(path, "away"); err != nil {
				t.Fatal(err)
			}
			f.until("problem " + path + ": no such file or directory; what it said stays in force: put it back")
			f.always("1/tcp")
			if err := os.Rename("away", path); err != nil {
				t.Fatal(err)
			}
			f.until("1/tcp", "no problem")
		})
	}
	f := watchOver(t, "one")
	f.until("1/tcp")
	write(t, "one", svc("b", 2))
	f.until("2/tcp")
}

func TestTooLarge(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1))
	f := watchOver(t, ".")
	f.until("a ClusterIP")
	write(t, ".big", "")
	if err := os.Truncate(".big", MaxFile+1); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(".big", "a.yaml"); err != nil {
		t.Fatal(err)
	}
	f.until("a ClusterIP", "problem a.yaml: cannot be read, what it said before stays in force: it is larger than 64 MiB: split it")
}

// TestOverflow loses events, as when the kernel's queue is full.
func TestOverflow(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a.yaml", svc("a", 1))
	write(t, "b.yaml", svc("b", 1))
	s, err := Open(".")
	if err != nil {
		t.Fatal(err)
	}
	w, err := newWatch()
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	s.scan(nil) // nothing is watched, so that every event is lost
	write(t, "a.yaml", svc("a", 2))
	write(t, "x/c.yaml", svc("c", 3))
	if err := os.Remove("b.yaml"); err != nil {
		t.Fatal(err)
	}
	overflow := make([]byte, unix.SizeofInotifyEvent)
	binary.NativeEndian.PutUint32(overflow, ^uint32(0))
	binary.NativeEndian.PutUint32(overflow[4:], unix.IN_Q_OVERFLOW)
	w.mu.Lock()
	w.note(overflow)
	w.mu.Unlock()
	<-w.wake
	s.apply(w.take(), w)
	if got := s.files.cluster.Snapshot(); !says(got, []string{"2/tcp", "c ClusterIP", "no b ClusterIP", "no problem"}) {
		t.Errorf("after lost events there is\n%s", dump(got))
	}
}

// TestBurst changes a few of many files many times at once and counts how often
// files are opened.
func TestBurst(t *testing.T) {
	const files, changed, rounds = 200, 5, 100
	t.Chdir(t.TempDir())
	for i := range files {
		write(t, fmt.Sprintf("s%d.yaml", i), svc(fmt.Sprint("s", i), 1))
	}
	f := watchOver(t, ".")
	f.until("s199 ClusterIP")
	opened := opens(t, ".")
	for round := range rounds {
		for i := range changed {
			write(t, fmt.Sprintf("s%d.yaml", i), svc(fmt.Sprint("s", i), 1000+round*changed+i))
		}
	}
	var last []string
	for i := range changed {
		last = append(last, fmt.Sprintf("%d/tcp", 1000+(rounds-1)*changed+i))
	}
	f.until(last...)
	for name, n := range opened() {
		var number int
		if _, err := fmt.Sscanf(filepath.Base(name), "s%d.yaml", &number); err == nil && (number >= changed || n > rounds) {
			t.Errorf("%s was opened %d times", name, n)
		}
	}
}

// opens starts to count the opening of files in a folder, by name.
func opens(t *testing.T, folder string) func() map[string]int {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, folder, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	return func() map[string]int {
		count, buffer := map[string]int{}, make([]byte, 1<<20)
		for {
			n, err := unix.Read(fd, buffer)
			if err == unix.EAGAIN {
				return count
			}
			if err != nil {
				t.Fatal(err)
			}
			for at := 0; at < n; {
				size := int(binary.NativeEndian.Uint32(buffer[at+12:]))
				start := at + unix.SizeofInotifyEvent
				count[strings.TrimRight(string(buffer[start:start+size]), "\x00")]++
				at = start + size
			}
		}
	}
}

// BenchmarkEventToSnapshot is from before a small JSON file is renamed into a
// folder of 1,000 until the Snapshot is delivered.
func BenchmarkEventToSnapshot(b *testing.B) {
	b.Chdir(b.TempDir())
	w, err := NewWriter(".")
	if err != nil {
		b.Fatal(err)
	}
	s := shopService("s0", 4)
	for i := range 1000 {
		s.Name.Name = fmt.Sprint("s", i)
		s.ClusterIPs = nil
		if err := w.PutService(s); err != nil {
			b.Fatal(err)
		}
	}
	f := watchOver(b, ".")
	<-f.snap
	var writing time.Duration
	for b.Loop() {
		s.Ports[0].Port++
		start := time.Now()
		if err := w.PutService(s); err != nil {
			b.Fatal(err)
		}
		writing += time.Since(start)
		<-f.snap
	}
	b.ReportMetric(float64(writing.Nanoseconds())/float64(b.N), "writing-ns/op")
}
