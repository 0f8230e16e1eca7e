package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// enterNode is run in the node's network namespace: it joins the node's cgroups,
// and from there starts the node's first process in namespaces of its own. Its
// arguments are those of beNode.
func enterNode(arguments []string) error {
	n, err := parseNode(arguments)
	if err != nil {
		return err
	}
	if err := joinCgroups(n); err != nil {
		return err
	}
	if err := os.MkdirAll(n.file("logs"), 0o755); err != nil {
		return err
	}
	log, err := os.Create(n.file("logs", "node.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	command := exec.Command("/proc/self/exe", append([]string{"node"}, arguments...)...)
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID | syscall.CLONE_NEWCGROUP,
	}
	if err := command.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.name(), err)
	}
	return write(n.file("pid"), strconv.Itoa(command.Process.Pid), 0o644)
}

func parseNode(arguments []string) (node, error) {
	if len(arguments) != 5 {
		return 0, errors.New("a node is started by up: NAME BINARIES PROXY MODE CNI")
	}
	number, err := strconv.Atoi(strings.TrimPrefix(arguments[0], "node-"))
	return node(number), err
}

// beNode is the first process of a node: when it ends, the kernel ends everything
// on the node.
func beNode(arguments []string) error {
	n, err := parseNode(arguments)
	if err != nil {
		return err
	}
	bin, w := arguments[1], wish{arguments[2], arguments[3], arguments[4]}
	if err := mounts(n); err != nil {
		return err
	}
	if err := configure(n, w); err != nil {
		return err
	}
	// The plug-ins and runc are found in PATH, and so is our kubelet.
	if err := os.Setenv("PATH", bin+":"+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	services := []*service{
		{name: "kubelet", arguments: []string{
			"--config=/etc/kubelet.yaml", "--kubeconfig=" + pki(n.name()+".kubeconfig"),
			"--hostname-override=" + n.name(), "--node-ip=" + n.v4() + "," + n.v6(),
		}},
	}
	if w.proxy == "kube-proxy" {
		services = append(services, &service{name: "kube-proxy", arguments: []string{"--config=/etc/kube-proxy.yaml"}})
	}
	if w.cni == flannel {
		s, err := flannelService(n)
		if err != nil {
			return err
		}
		services = append(services, s)
	}
	containerd := &service{name: "containerd", arguments: []string{"-c", "/etc/containerd.toml"}}
	if err := containerd.start(n); err != nil {
		return err
	}
	if err := importImages(n); err != nil {
		return err
	}
	for _, s := range services {
		if err := s.start(n); err != nil {
			return err
		}
	}
	return supervise(n, append(services, containerd))
}

// importImages as soon as containerd listens. Nothing else has a child yet, so
// that waiting here takes none from supervise.
func importImages(n node) error {
	err := until(context.Background(), "containerd", time.Minute, func() error {
		_, err := os.Stat("/run/containerd/containerd.sock")
		return err
	})
	if err != nil {
		return err
	}
	for _, image := range imageFiles() {
		if _, err := output(exec.Command("ctr", "-n", "k8s.io", "images", "import", image)); err != nil {
			return fmt.Errorf("import image: %w", err)
		}
	}
	say("images are imported")
	return nil
}

// service is a program that runs as long as the node does.
type service struct {
	name      string
	arguments []string
	pid       int
}

// whenOn starts a service once there is no file /run/NAME.off: who wants it stopped
// makes that, and ends the process.
const whenOn = `while test -e /run/$0.off; do sleep 0.1; done; exec "$0" "$@"`

func (s *service) start(n node) error {
	log, err := os.OpenFile(n.file("logs", s.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	command := exec.Command("sh", append([]string{"-c", whenOn, s.name}, s.arguments...)...)
	command.Stdout, command.Stderr = log, log
	if err := command.Start(); err != nil {
		return fmt.Errorf("start %s: %w", s.name, err)
	}
	s.pid = command.Process.Pid
	return command.Process.Release()
}

// supervise reaps every process of the node, as its first one must, and starts a
// service that ended again after a second, as systemd would.
func supervise(n node, services []*service) error {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for processes of %s: %w", n.name(), err)
		}
		for _, s := range services {
			if s.pid != pid {
				continue
			}
			say("%s ended with status %d, signal %d: start it again", s.name, status.ExitStatus(), status.Signal())
			time.Sleep(time.Second)
			if err := s.start(n); err != nil {
				return err
			}
		}
	}
}

// mounts gives the node files of its own where those of the host are seen
// otherwise, and file systems that show its namespaces.
func mounts(n node) error {
	groups, err := hierarchies()
	if err != nil {
		return err
	}
	if err := syscall.Sethostname([]byte(n.name())); err != nil {
		return fmt.Errorf("name %s: %w", n.name(), err)
	}
	for _, path := range []string{"var-lib", "var-log", "opt", "etc", "etc-work"} {
		if err := os.MkdirAll(n.file(path), 0o755); err != nil {
			return err
		}
	}
	err = mountAll([]mount{
		{"", "/", "", syscall.MS_REC | syscall.MS_PRIVATE, ""},
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"bpf", "/sys/fs/bpf", "bpf", 0, ""},
		{"run", "/run", "tmpfs", 0, "mode=755"},
		{n.file("var-lib"), "/var/lib", "", syscall.MS_BIND, ""},
		{n.file("var-log"), "/var/log", "", syscall.MS_BIND, ""},
		{n.file("opt"), "/opt", "", syscall.MS_BIND, ""},
		{"etc", "/etc", "overlay", 0, "lowerdir=/etc,upperdir=" + n.file("etc") + ",workdir=" + n.file("etc-work")},
		{"cgroup", "/sys/fs/cgroup", "tmpfs", 0, "mode=755"},
	})
	if err != nil {
		return err
	}
	for _, h := range groups {
		if err := mountAll([]mount{{h.kind, h.path, h.kind, 0, h.options}}); err != nil {
			return err
		}
	}
	if err := shieldHost(); err != nil {
		return err
	}
	// Volumes that are mounted in the node have to be seen in its pods.
	return mountAll([]mount{{"", "/", "", syscall.MS_REC | syscall.MS_SHARED, ""}})
}

type mount struct {
	source, target, kind string
	flags                uintptr
	options              string
}

func mountAll(all []mount) error {
	for _, m := range all {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind+m.source, m.target, err)
		}
	}
	return nil
}

// shieldHost lets the kubelet believe that these sysctls are as it wants them:
// they belong to no namespace, so writing them would change the host.
func shieldHost() error {
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		file := filepath.Join("/run/sysctl", name)
		if err := write(file, value+"\n", 0o644); err != nil {
			return err
		}
		if err := syscall.Mount(file, filepath.Join("/proc/sys", name), "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount over sysctl %s: %w", name, err)
		}
	}
	return nil
}
