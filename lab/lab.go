package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/millrace/millrace/model"
)

// The errors that a caller tells apart.
var (
	// ErrUp says that a lab of this name is up already.
	ErrUp = errors.New("the lab is up already")
	// ErrNotUp says that no lab of this name is up.
	ErrNotUp = errors.New("no such lab is up")
	// ErrName says that a lab's name cannot be used.
	ErrName = errors.New("bad lab name")
	// ErrPrivilege says that a capability is missing.
	ErrPrivilege = errors.New("not enough privileges")
)

// Store is where the living cluster is published as Kubernetes objects. The
// lab calls it from one goroutine. An error is retried until it goes away.
type Store interface {
	PutService(*model.Service) error
	DeleteService(model.Name) error
	PutPod(*model.Pod) error
	DeletePod(model.Name) error
	PutNode(*model.Node) error
	DeleteNode(name string) error
}

// Config says what a lab is made of and what it needs from outside.
type Config struct {
	// Name is 1 to 40 lower-case letters, digits and dashes.
	Name string
	// Nodes is how many nodes there are where the manifests hold no Node
	// objects; 0 is 3.
	Nodes int
	// Folder holds everything the lab leaves in the file system; empty is
	// Folder(Name). At most 60 bytes, because the paths of unix sockets below it
	// are limited.
	Folder string
	// Watch delivers the manifests, and again whenever they change, until ctx
	// ends. The first complete Snapshot brings the lab up.
	Watch func(ctx context.Context, deliver func(*model.Snapshot)) error
	// Store opens the place for the living cluster, in a folder that it may
	// make: the ClusterFolder of every NodeInfo. Nil publishes nothing.
	Store func(folder string) (Store, error)
	// AgentCommand is the argv of a node's agent; nil runs no agents.
	AgentCommand func(NodeInfo) []string
	// PodCommand is the argv of PodMain; empty is this executable and
	// "lab-pod". The pod's name is appended.
	PodCommand []string
	// Drain is how long a pod that left the endpoints keeps serving; 0 is 3 s.
	Drain time.Duration
	// Progress gets a line for people now and then; nil discards them.
	Progress func(line string)
	// Up is called once, when every pod that can be is ready and published and
	// every agent is ready; nil is allowed.
	Up func()

	patience time.Duration // usualPatience, but for tests
}

// NodeInfo is what a node's agent is told: all paths are absolute.
type NodeInfo struct {
	Lab  string `json:"lab"`
	Node string `json:"node"`
	// Netns is what the node's network namespace is bound to. The agent is
	// started inside it.
	Netns string `json:"netns"`
	// Cgroup is the node's group: the agent's own, the host's and those of the
	// node's pods are below it.
	Cgroup string `json:"cgroup"`
	// BPFFolder is the node's own folder in the lab's bpf file system.
	BPFFolder string `json:"bpf_folder"`
	// ClusterFolder is where the living cluster is published.
	ClusterFolder string `json:"cluster_folder"`
	// RunFolder is for the agent's files. The agent is ready when
	// RunFolder/agent.sock answers GET /status with HTTP status 200 and a JSON
	// object whose field ready is true.
	RunFolder string `json:"run_folder"`
}

// Base is the folder that holds a folder, or a symbolic link to one, for every
// lab of this host.
const Base = "/run/millrace/lab"

// Folder is where a lab of this name lives unless Config says otherwise.
func Folder(name string) string { return filepath.Join(Base, name) }

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

// check completes the settings and refuses what cannot work.
func (c *Config) check() error {
	if err := checkName(c.Name); err != nil {
		return err
	}
	if c.Watch == nil {
		return errors.New("bring up lab: Config.Watch is nil: there are no manifests to watch")
	}
	if c.Folder == "" {
		c.Folder = Folder(c.Name)
	}
	if !filepath.IsAbs(c.Folder) || len(c.Folder) > 60 {
		return fmt.Errorf("bring up lab %s: folder %q: want an absolute path of at most 60 bytes", c.Name, c.Folder)
	}
	if c.Nodes == 0 {
		c.Nodes = 3
	}
	if c.Drain == 0 {
		c.Drain = 3 * time.Second
	}
	if c.patience == 0 {
		c.patience = usualPatience
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	if c.Up == nil {
		c.Up = func() {}
	}
	if len(c.PodCommand) == 0 {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("bring up lab %s: %w", c.Name, err)
		}
		c.PodCommand = []string{self, "lab-pod"}
	}
	return checkPrivileges()
}

func checkName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("%w %q: use 1 to 40 lower-case letters, digits and dashes", ErrName, name)
	}
	return nil
}
