package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/pod/pool"
)

// The commands of CNI that go to the agent (https://www.cni.dev/docs/spec/#cni-operations).
const (
	Add    = "ADD"
	Del    = "DEL"
	Check  = "CHECK"
	GC     = "GC"
	Status = "STATUS"
)

// Request is what a runtime asks.
type Request struct {
	Command   string `json:"command"`
	Container string `json:"container,omitempty"`
	Interface string `json:"interface,omitempty"`
	// Args are CNI_ARGS, "K=V;K=V".
	Args string `json:"args,omitempty"`
	// Space is the path of the pod's network namespace, by which the runtime knows it.
	Space string `json:"netns,omitempty"`
	// Config is the network configuration, as the runtime wrote it.
	Config json.RawMessage `json:"config"`
	// Namespace is that namespace; nil where none was named, or it has gone.
	Namespace *os.File `json:"-"`
}

// Config is what this plugin reads of a network configuration.
type Config struct {
	types.PluginConf
	// Socket is where the agent listens; empty is DefaultSocket.
	Socket string `json:"socket,omitempty"`
	// RuntimeConfig is what the runtime says of one pod, as far as the configuration has
	// said that the plugin can do it (https://www.cni.dev/docs/conventions/).
	RuntimeConfig RuntimeConfig `json:"runtimeConfig,omitzero"`
}

// RuntimeConfig is what a runtime asks for one pod, by the names of capabilities.
type RuntimeConfig struct {
	Bandwidth pool.Bandwidth `json:"bandwidth,omitzero"`
	// PortMappings are the pod's hostPorts.
	PortMappings []PortMapping `json:"portMappings,omitempty"`
}

// PortMapping is a port of the node that leads to one of the pod, as the runtime wrote it.
type PortMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	// HostIP is the node's address that has it; empty for all.
	HostIP string `json:"hostIP,omitempty"`
}

// Read reads the configuration of a request.
func (r *Request) Read() (*Config, error) {
	c := &Config{}
	if err := json.Unmarshal(r.Config, c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the network configuration: "+err.Error(), "")
	}
	return c, nil
}

// Previous is the result that the runtime got of an earlier ADD; nil where it names none.
func (c *Config) Previous() (*types100.Result, error) {
	if c.RawPrevResult == nil {
		return nil, nil
	}
	err := version.ParsePrevResult(&c.PluginConf)
	if err == nil {
		var result *types100.Result
		if result, err = types100.NewResultFromResult(c.PrevResult); err == nil {
			return result, nil
		}
	}
	return nil, types.NewError(types.ErrDecodingFailure, "read prevResult: "+err.Error(), "")
}

// Pod is the pod's NAMESPACE/NAME, as kubelet's runtimes say it in CNI_ARGS; empty where
// they do not, or what they say is no name.
func (r *Request) Pod() string {
	said := map[string]string{}
	for pair := range strings.SplitSeq(r.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		said[key] = value
	}
	namespace, name := said["K8S_POD_NAMESPACE"], said["K8S_POD_NAME"]
	if !isName(namespace) || !isName(name) {
		return ""
	}
	return namespace + "/" + name
}

// isName says whether a text has the letters of a name of Kubernetes (RFC 1123), and at
// most 253 of them.
func isName(text string) bool {
	outside := func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.' }
	return text != "" && len(text) <= 253 && !strings.ContainsFunc(text, outside)
}

// answer is what the agent says.
type answer struct {
	Result *types100.Result `json:"result,omitempty"`
	Error  *types.Error     `json:"error,omitempty"`
}

// mostBytes is how long a message may be: a GC names every container of the node, in
// about a hundred bytes each.
const mostBytes = 1 << 20

var errLong = fmt.Errorf("a message has more than %d bytes", mostBytes)

// send writes a message, with an open file if there is one, and ends the writing.
func send(c *net.UnixConn, message any, file *os.File) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(text) > mostBytes {
		return errLong
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	n, _, err := c.WriteMsgUnix(text, rights, nil)
	if err == nil && n < len(text) {
		_, err = c.Write(text[n:])
	}
	if err == nil {
		err = c.CloseWrite()
	}
	return err
}

// receive reads a message whole, and the open file that came with it; that is the
// caller's to close.
func receive(c *net.UnixConn, into any) (file *os.File, err error) {
	defer func() {
		if err != nil && file != nil {
			file.Close()
			file = nil
		}
	}()
	text, rights := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	n, with, flags, _, err := c.ReadMsgUnix(text, rights)
	file = fileIn(rights[:with])
	if err != nil && !errors.Is(err, io.EOF) {
		return file, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return file, errors.New("more files came with the message than one")
	}
	rest, err := io.ReadAll(io.LimitReader(c, int64(mostBytes-n+1)))
	if err != nil {
		return file, err
	}
	if text = append(text[:n], rest...); len(text) > mostBytes {
		return file, errLong
	}
	return file, json.Unmarshal(text, into)
}

// fileIn is the first open file that came with a message; others are closed.
func fileIn(rights []byte) (file *os.File) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil
	}
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i])
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			if file == nil {
				file = os.NewFile(uintptr(fd), "network namespace")
				continue
			}
			unix.Close(fd)
		}
	}
	return file
}

// sayer is how long whoever is connected may take to say what it has to say.
const sayer = 10 * time.Second
