package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/millrace/millrace/layer/pod/pool"
)

// The test binary is the plugin when a runtime starts it.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(Main())
	}
	os.Exit(m.Run())
}

// runtime is what starts plugins, and an agent beside it that answers what it is told to.
type runtime struct {
	t      *testing.T
	socket string
	asked  chan *Request
}

func newRuntime(t *testing.T, answer Answer) *runtime {
	folder, err := os.MkdirTemp("", "cni") // sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	r := &runtime{t, filepath.Join(folder, "cni.sock"), make(chan *Request, 100)}
	if answer == nil {
		return r
	}
	server, err := Listen(r.socket, func(ctx context.Context, q *Request) (*types100.Result, error) {
		r.asked <- q
		return answer(ctx, q)
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

// run starts the plugin and returns what it printed, and whether it said to have failed.
func (r *runtime) run(stdin string, env ...string) (stdout string, failed bool) {
	r.t.Helper()
	c := exec.Command(os.Args[0])
	c.Stdin = strings.NewReader(stdin)
	c.Env = append([]string{"CNI_PATH=/opt/cni/bin"}, env...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		r.t.Fatal(err)
	}
	if strings.Contains(errs.String(), "panic") || strings.Contains(errs.String(), "goroutine") {
		r.t.Fatalf("%s", errs.String())
	}
	return out.String(), err != nil
}

func (r *runtime) config(version string) string {
	return fmt.Sprintf(`{"cniVersion":%q,"name":"town","type":"millrace","socket":%q}`, version, r.socket)
}

func result(*testing.T) *types100.Result {
	inside := 0
	return &types100.Result{CNIVersion: "1.1.0", Interfaces: []*types100.Interface{{Name: "eth0", Mtu: 1400, Sandbox: "/run/netns/a"}},
		IPs: []*types100.IPConfig{{Interface: &inside, Address: net.IPNet{IP: net.IP{10, 1, 0, 7}, Mask: net.CIDRMask(32, 32)}}}}
}

var ofWeb = []string{"CNI_CONTAINERID=web-1", "CNI_IFNAME=eth0", "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"}

// What a runtime says comes to the agent, and the answer to the runtime, in the version
// that it speaks.
func TestPlugin(t *testing.T) {
	r := newRuntime(t, func(_ context.Context, q *Request) (*types100.Result, error) {
		if q.Command != Add {
			return nil, nil
		}
		return result(t), nil
	})
	own := append(ofWeb, "CNI_NETNS=/proc/self/ns/mnt", "CNI_COMMAND=ADD") // any open file does
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		out, failed := r.run(r.config(version), own...)
		var got struct {
			Version string `json:"cniVersion"`
			IPs     []struct {
				Address string `json:"address"`
			} `json:"ips"`
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil || failed || got.Version != version || len(got.IPs) != 1 || got.IPs[0].Address != "10.1.0.7/32" {
			t.Errorf("%s: %s, %v", version, out, err)
		}
		q := <-r.asked
		if q.Command != Add || q.Container != "web-1" || q.Interface != "eth0" || q.Space != "/proc/self/ns/mnt" || q.Pod() != "shop/web" || q.Namespace == nil {
			t.Errorf("the agent was asked %+v", q)
		}
	}
	for _, command := range []string{Del, Check, GC, Status} {
		out, failed := r.run(r.config("1.1.0"), append(ofWeb, "CNI_NETNS=/proc/self/ns/mnt", "CNI_COMMAND="+command)...)
		if out != "" || failed {
			t.Errorf("%s: %s", command, out)
		}
		if q := <-r.asked; q.Command != command {
			t.Errorf("%s became %s", command, q.Command)
		}
	}
	// The namespace has gone before DEL.
	if out, failed := r.run(r.config("1.1.0"), append(ofWeb, "CNI_NETNS=/absent", "CNI_COMMAND=DEL")...); failed || (<-r.asked).Namespace != nil {
		t.Errorf("DEL without a namespace: %s", out)
	}
	if out, _ := r.run("", "CNI_COMMAND=VERSION"); !strings.Contains(out, `"1.1.0"`) || !strings.Contains(out, `"0.3.1"`) {
		t.Errorf("VERSION: %s", out)
	}
}

// What a runtime asks for one pod comes with the configuration.
func TestRuntimeConfig(t *testing.T) {
	r := &Request{Config: []byte(`{"name":"town","runtimeConfig":{"bandwidth":{"ingressRate":20000000,"ingressBurst":4294967295,"egressRate":1000000,"egressBurst":34359738359}}}`)}
	c, err := r.Read()
	if want := (pool.Bandwidth{IngressRate: 20e6, IngressBurst: 1<<32 - 1, EgressRate: 1e6, EgressBurst: 8*(1<<32-1) - 1}); err != nil || c.RuntimeConfig.Bandwidth != want {
		t.Errorf("%+v, %v", c, err)
	}
}

// Errors are what CNI says that they are: JSON with a code, on stdout.
func TestErrorsOfThePlugin(t *testing.T) {
	r := newRuntime(t, func(_ context.Context, q *Request) (*types100.Result, error) {
		if q.Container == "known" {
			return nil, types.NewError(types.ErrTryAgainLater, "no address is left", "of 10.1.0.0/24")
		}
		return nil, errors.New("the disk is full")
	})
	nobody := newRuntime(t, nil)
	for _, row := range []struct {
		what, stdin, env string
		code             uint
		says             string
	}{
		{"an error of the agent", r.config("1.1.0"), "CNI_CONTAINERID=known CNI_COMMAND=ADD CNI_NETNS=/proc/self/ns/mnt", types.ErrTryAgainLater, "no address is left"},
		{"another one", r.config("1.1.0"), "CNI_CONTAINERID=web CNI_COMMAND=DEL", types.ErrInternal, "the disk is full"},
		{"nobody there", nobody.config("1.1.0"), "CNI_COMMAND=STATUS", types.ErrPluginNotAvailable, "does not answer"},
		{"no namespace", r.config("1.1.0"), "CNI_CONTAINERID=web CNI_COMMAND=ADD CNI_NETNS=/absent", types.ErrInvalidNetNS, "/absent"},
		{"no container", r.config("1.1.0"), "CNI_COMMAND=ADD CNI_NETNS=/proc/self/ns/mnt", types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID"},
		{"a path for a container", r.config("1.1.0"), "CNI_CONTAINERID=../x CNI_COMMAND=DEL", types.ErrInvalidEnvironmentVariables, "invalid characters"},
		{"no configuration", "", "CNI_CONTAINERID=web CNI_COMMAND=DEL", types.ErrDecodingFailure, ""},
		{"no name", `{"cniVersion":"1.1.0"}`, "CNI_CONTAINERID=web CNI_COMMAND=DEL", types.ErrInvalidNetworkConfig, "missing network name"},
		{"a socket that is a number", `{"cniVersion":"1.1.0","name":"a","socket":7}`, "CNI_CONTAINERID=web CNI_COMMAND=DEL", types.ErrDecodingFailure, "socket"},
		{"a version of the future", r.config("9.0.0"), "CNI_CONTAINERID=web CNI_COMMAND=DEL", types.ErrIncompatibleCNIVersion, "incompatible"},
		{"GC of an old version", r.config("1.0.0"), "CNI_COMMAND=GC", types.ErrIncompatibleCNIVersion, "does not allow GC"},
		{"nonsense", r.config("1.1.0"), "CNI_COMMAND=NONSENSE", types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND"},
	} {
		out, failed := r.run(row.stdin, append([]string{"CNI_IFNAME=eth0"}, strings.Fields(row.env)...)...)
		var got types.Error
		if err := json.Unmarshal([]byte(out), &got); err != nil || !failed || got.Code != row.code || !strings.Contains(got.Msg, row.says) {
			t.Errorf("%s: %s, %v; not code %d with %q", row.what, out, err, row.code, row.says)
		}
	}
}

// Whoever says nothing, or too much, or nonsense holds up nobody else.
func TestBadCompany(t *testing.T) {
	r := newRuntime(t, func(context.Context, *Request) (*types100.Result, error) { return nil, nil })
	for range 8 { // who never says anything
		c, err := net.Dial("unix", r.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for _, text := range []string{"", "nonsense", `{"command":7}`, strings.Repeat(" ", mostBytes+2), `{"command":"` + strings.Repeat("x", mostBytes) + `"}`} {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: r.socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		go func() { _, _ = c.Write([]byte(text)); _ = c.CloseWrite() }()
		var a answer
		_, err = receive(c, &a)
		if err == nil && (a.Error == nil || a.Error.Code != types.ErrDecodingFailure) {
			t.Errorf("%.20q: %+v", text, a)
		}
		c.Close()
	}
	if _, err := Ask(t.Context(), r.socket, &Request{Command: Status, Config: []byte("{}")}, 0); err != nil {
		t.Errorf("somebody with something to say: %v", err)
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"town","type":"millrace","socket":"/x","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`), "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web")
	f.Add([]byte(`{"prevResult":{"cniVersion":"0.4.0","ips":[{"version":"4","interface":0,"address":"10.1.0.7/32"}]}}`), ";=;K8S_POD_NAME=\x1b[2J")
	f.Add([]byte(`{"prevResult":{"ips":[null,{"interface":-1}],"interfaces":[null]}}`), "")
	f.Add([]byte(`nonsense`), "==")
	f.Fuzz(func(t *testing.T, config []byte, args string) {
		r := &Request{Config: config, Args: args}
		if name := r.Pod(); strings.ContainsFunc(name, func(c rune) bool { return c < '-' || c > 'z' }) {
			t.Errorf("%q is a pod's name", name)
		}
		c, err := r.Read()
		if err != nil {
			return
		}
		_, _ = c.Previous()
	})
}
