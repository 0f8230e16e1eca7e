package resolv

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// ofKubelet is what kubelet writes for a pod.
const ofKubelet = "search shop.svc.cluster.local svc.cluster.local cluster.local example.com\nnameserver 10.96.0.10\noptions ndots:5\n"

func TestConf(t *testing.T) {
	for _, row := range []struct{ what, text, want string }{
		{"of kubelet", ofKubelet, "[10.96.0.10] [shop.svc.cluster.local svc.cluster.local cluster.local example.com] 5"},
		{"empty", "", "[] [] 1"},
		{"the last list counts", "search a b\ndomain c\nsearch D.\n", "[] [d] 1"},
		{"a domain", "nameserver fd00::a\ndomain Example.COM\n", "[fd00::a] [example.com] 1"},
		{"three servers", "nameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\nnameserver 4.4.4.4\n", "[1.1.1.1 2.2.2.2 3.3.3.3] [] 1"},
		{"comments and others", "# search x\n;search y\nsortlist 1.2.3.4\n\n  \noptions edns0 timeout:1\noptions ndots:99 rotate\n", "[] [] 15"},
		{"tabs and no end", "nameserver\t10.0.0.1\nsearch\ta \t b", "[10.0.0.1] [a b] 1"},
		{"server twice on a line", "nameserver 10.0.0.1 10.0.0.2\n", "[10.0.0.1] [] 1"},
	} {
		conf, err := Parse(row.text)
		if got := fmt.Sprint(conf.Servers, conf.Search, conf.Ndots); err != nil || got != row.want {
			t.Errorf("%s: %s, %v, not %s", row.what, got, err, row.want)
		}
	}
}

// What one resolver takes and another does not is nobody's list.
func TestConfThatIsRefused(t *testing.T) {
	for what, text := range map[string]string{
		"blanks before":  " search a\n",
		"a comment":      "search a # b\n",
		"the root":       "search a .\n",
		"carriage":       "search a\r\n",
		"zero":           "search a\x00b\n",
		"nothing":        "search\n",
		"two domains":    "domain a b\n",
		"no server":      "nameserver localhost\n",
		"octal":          "nameserver 010.0.0.1\n",
		"no number":      "options ndots:x\n",
		"negative":       "options ndots:-1\n",
		"a long line":    "search " + strings.Repeat("abcdefgh.", 28) + "\n",
		"a long label":   "search " + strings.Repeat("a", 64) + "\n",
		"an empty label": "search a..b\n",
	} {
		if conf, err := Parse(text); err == nil {
			t.Errorf("%s: %+v and no error", what, conf)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(ofKubelet)
	f.Add("search a b\ndomain c\n options ndots:3\nnameserver ::1%eth0\n")
	f.Fuzz(func(t *testing.T, text string) {
		conf, err := Parse(text)
		if err != nil {
			return
		}
		if conf.Ndots < 0 || conf.Ndots > mostDots || len(conf.Servers) > mostServers {
			t.Errorf("%q: %+v", text, conf)
		}
		for _, suffix := range conf.Search {
			if !isDomain(suffix) || suffix != strings.ToLower(suffix) {
				t.Errorf("%q: suffix %q", text, suffix)
			}
		}
	})
}

// node is a network namespace with pods, which are others.
type node struct {
	at   string
	pods int
}

func newNode(t testing.TB) *node {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	n := &node{at: filepath.Join(t.TempDir(), "node")}
	must(t, netns.Create(n.at))
	t.Cleanup(func() { must(t, netns.Remove(n.at)) })
	return n
}

// pod makes a namespace and gives its path, and its number in the node's.
func (n *node) pod(t testing.TB) (path string, number int) {
	t.Helper()
	n.pods++
	path = filepath.Join(filepath.Dir(n.at), fmt.Sprint("pod", n.pods))
	must(t, netns.Create(path))
	t.Cleanup(func() { must(t, netns.Remove(path)) })
	at, err := link.Open(n.at)
	must(t, err)
	defer at.Close()
	device := fmt.Sprint("veth", n.pods)
	_, err = at.Veth(link.Veth{Name: device, Peer: "eth0", PeerNamespace: path})
	must(t, err)
	found, err := at.Devices()
	must(t, err)
	for _, d := range found {
		if d.Name == device {
			return path, d.PeerNamespace
		}
	}
	t.Fatalf("%s is not there", device)
	return "", 0
}

// container runs this program in a namespace, with a root of its own, until the test ends or
// the function that it returns is called.
func container(t testing.TB, space, root string) (stop func()) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	c := exec.Command(self, "-test.run", "^TestAsContainer$")
	c.Env = append(os.Environ(), "CONTAINER="+root)
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	in, err := c.StdinPipe()
	must(t, err)
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, netns.Do(space, c.Start))
	var once bool
	stop = func() {
		if !once {
			once = true
			in.Close()
			_ = c.Wait()
		}
	}
	t.Cleanup(stop)
	_, err = io.ReadFull(out, make([]byte, 1)) // it is there
	must(t, err)
	return stop
}

// TestAsContainer is not a test: it is the process in a container.
func TestAsContainer(t *testing.T) {
	root := os.Getenv("CONTAINER")
	if root == "" {
		return
	}
	must(t, unix.Chroot(root))
	fmt.Print(".")
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// root is a folder whose /etc/resolv.conf has a text.
func root(t testing.TB, text string) string {
	t.Helper()
	folder := t.TempDir()
	must(t, os.Mkdir(filepath.Join(folder, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(folder, "etc/resolv.conf"), []byte(text), 0o644))
	return folder
}

func (n *node) view(t testing.TB, number int) (View, bool) {
	t.Helper()
	var r Reader
	views, err := r.Views(n.at)
	must(t, err)
	view, any := views[number]
	return view, any
}

// What the containers of a pod agree on is the pod's; what changes is seen.
func TestViewOfAPod(t *testing.T) {
	n := newNode(t)
	pod, number := n.pod(t)
	other, otherNumber := n.pod(t)
	if view, any := n.view(t, number); any {
		t.Errorf("nobody is there, and the view is %+v", view)
	}
	first := root(t, ofKubelet)
	container(t, pod, first)
	container(t, other, root(t, "nameserver 192.0.2.53\n"))
	if view, any := n.view(t, otherNumber); !any || view.Err != nil || len(view.Conf.Search) > 0 || !slices.Equal(view.Conf.Servers, []netip.Addr{netip.MustParseAddr("192.0.2.53")}) {
		t.Errorf("another pod: %+v", view)
	}
	agrees := func(what string) {
		t.Helper()
		if view, any := n.view(t, number); !any || view.Err != nil || len(view.Conf.Search) != 4 || view.Conf.Ndots != 5 {
			t.Errorf("%s: %+v", what, view)
		}
	}
	agrees("one container")
	container(t, pod, root(t, ofKubelet+"# the same in other words\n"))
	agrees("a second one")
	container(t, pod, t.TempDir())
	agrees("one without a file")
	container(t, pod, "/") // as a container that has not got its root yet
	agrees("one that sees the node's file")
	stop := container(t, pod, root(t, "search svc.cluster.local\nnameserver 10.96.0.10\n"))
	if view, _ := n.view(t, number); view.Err != errDiffer {
		t.Errorf("containers that differ: %+v", view)
	}
	stop()
	agrees("it has ended")
	must(t, os.WriteFile(filepath.Join(first, "etc/resolv.conf"), []byte("nameserver 10.96.0.10\n"), 0o644))
	if view, _ := n.view(t, number); view.Err != errDiffer {
		t.Errorf("the file of one is another: %+v", view)
	}
}

// Files of people who mean harm are not opened, not waited for, and not believed.
func TestHostileFiles(t *testing.T) {
	n := newNode(t)
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte(ofKubelet), 0o600))
	for what, make := range map[string]func(path string) error{
		"a pipe":            func(path string) error { return unix.Mkfifo(path, 0o644) },
		"a device":          func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))) },
		"a folder":          func(path string) error { return os.Mkdir(path, 0o755) },
		"a large file":      func(path string) error { return os.WriteFile(path, make([]byte, sizeLimit+1), 0o644) },
		"a hole":            func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"its own end":       func(path string) error { return os.Symlink("resolv.conf", path) },
		"garbage":           func(path string) error { return os.WriteFile(path, []byte("search \xff\xfe\n"), 0o644) },
		"out by its path":   func(path string) error { return os.Symlink(secret, path) },
		"out by its parent": func(path string) error { return os.Symlink("../../../../../../../../.."+secret, path) },
	} {
		t.Run(what, func(t *testing.T) {
			pod, number := n.pod(t)
			folder := t.TempDir()
			must(t, os.Mkdir(filepath.Join(folder, "etc"), 0o755))
			must(t, make(filepath.Join(folder, "etc/resolv.conf")))
			if what == "a hole" {
				must(t, os.Truncate(filepath.Join(folder, "etc/resolv.conf"), 1<<40))
			}
			container(t, pod, folder)
			view, _ := n.view(t, number)
			if len(view.Conf.Search) > 0 || len(view.Conf.Servers) > 0 {
				t.Errorf("%+v", view)
			}
			if out := strings.HasPrefix(what, "out"); out == (view.Err != nil) {
				t.Errorf("the view is %+v", view) // what leads out leads nowhere
			}
			t.Log(view.Err)
		})
	}
}

// A symbolic link is followed inside the root of the container.
func TestLinkInside(t *testing.T) {
	n := newNode(t)
	pod, number := n.pod(t)
	folder := root(t, "")
	must(t, os.Mkdir(filepath.Join(folder, "run"), 0o755))
	must(t, os.WriteFile(filepath.Join(folder, "run/resolv.conf"), []byte(ofKubelet), 0o644))
	must(t, os.Remove(filepath.Join(folder, "etc/resolv.conf")))
	must(t, os.Symlink("/run/resolv.conf", filepath.Join(folder, "etc/resolv.conf")))
	container(t, pod, folder)
	if view, _ := n.view(t, number); view.Err != nil || len(view.Conf.Search) != 4 {
		t.Errorf("%+v", view)
	}
}

// A file system that does not answer holds up one pod, and nobody else.
func TestFileSystemThatHangs(t *testing.T) {
	n := newNode(t)
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	at := filepath.Join(t.TempDir(), "etc")
	must(t, os.Mkdir(at, 0o755))
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device)
	must(t, unix.Mount("nobody", at, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options)) // who has the device answers nothing
	unmount := sync.OnceFunc(func() {
		unix.Close(device) // who waits gets an error
		must(t, unix.Unmount(at, unix.MNT_DETACH))
	})
	defer unmount()
	pod, number := n.pod(t)
	container(t, pod, filepath.Dir(at))
	healthy, healthyNumber := n.pod(t)
	container(t, healthy, root(t, ofKubelet))

	var r Reader
	for _, what := range []string{"first", "again"} {
		begun := time.Now()
		views, err := r.Views(n.at)
		must(t, err)
		if views[number].Err != errSlow || len(views[healthyNumber].Conf.Search) != 4 {
			t.Errorf("%s: %+v", what, views)
		}
		if took := time.Since(begun); what == "again" && took > patience {
			t.Errorf("what hangs is waited for again, %v", took)
		}
	}
	unmount()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		views, err := r.Views(n.at)
		must(t, err)
		if views[number].Err != errSlow {
			break
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatal("the file system is gone, and is still waited for")
		}
	}
}

// What it costs to look at a node: of pods with a container each.
func BenchmarkViews(b *testing.B) {
	n := newNode(b)
	const pods = 20
	for range pods {
		pod, _ := n.pod(b)
		container(b, pod, root(b, ofKubelet))
	}
	folders, err := netns.Processes()
	must(b, err)
	var r Reader
	var before, after unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &before))
	for b.Loop() {
		views, err := r.Views(n.at)
		must(b, err)
		if len(views) != pods {
			b.Fatalf("%d views", len(views))
		}
	}
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &after))
	took := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(took)/1e6/float64(b.N), "cpu-ms/op")
	b.ReportMetric(float64(len(folders)), "processes")
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
