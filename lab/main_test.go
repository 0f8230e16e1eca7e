package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

// TestMain lets the test binary be every process of a lab.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "lab-pod":
			os.Exit(PodMain(os.Args[2:]))
		case "lab-agent":
			os.Exit(standInAgent(os.Args[2]))
		case "lab-daemon":
			os.Exit(daemonMain(os.Args[2:]))
		case "lab-exec":
			fmt.Fprintln(os.Stderr, Exec(os.Args[2], os.Args[3], os.Args[4:]))
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// standInAgent is ready after being asked twice, like an agent that has work
// to do first.
func standInAgent(runFolder string) int {
	listener, err := net.Listen("unix", filepath.Join(runFolder, "agent.sock"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var mu sync.Mutex
	asked := 0
	http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		json.NewEncoder(w).Encode(map[string]bool{"ready": r.URL.Path == "/status" && asked > 2})
	}))
	return 1
}

// daemonMain is a lab in a process of its own: name, folder, the number of
// pods of its one Deployment and, unless it is the stand-in, the agent's argv.
func daemonMain(args []string) int {
	pods, err := strconv.Atoi(args[2])
	if err != nil {
		return 2
	}
	cfg := testConfig(args[0], args[1], watchOnce(shop(pods)))
	if len(args) > 3 {
		cfg.AgentCommand = func(NodeInfo) []string { return args[3:] }
	}
	if err := Daemon(context.Background(), cfg); err != nil {
		return 1
	}
	return 0
}

// testConfig is a lab of two nodes with stand-in agents.
func testConfig(name, folder string, watch func(context.Context, func(*model.Snapshot)) error) Config {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Config{
		Name:         name,
		Nodes:        2,
		Folder:       folder,
		Watch:        watch,
		AgentCommand: func(n NodeInfo) []string { return []string{self, "lab-agent", n.RunFolder} },
		Drain:        300 * time.Millisecond,
	}
}

func watchOnce(s *model.Snapshot) func(context.Context, func(*model.Snapshot)) error {
	return func(ctx context.Context, deliver func(*model.Snapshot)) error {
		deliver(s)
		<-ctx.Done()
		return nil
	}
}

var webPorts = []model.ContainerPort{
	{Name: "web", Protocol: model.TCP, Port: 8080},
	{Name: "dns", Protocol: model.UDP, Port: 8080},
	{Name: "more", Protocol: model.TCP, Port: 9090},
}

// deployment is a workload whose pods carry the label app=name.
func deployment(name string, replicas int, ports ...model.ContainerPort) *model.Workload {
	return &model.Workload{
		Name:     model.Name{Namespace: "default", Name: name},
		Kind:     "Deployment",
		Replicas: replicas,
		Template: model.Pod{Labels: map[string]string{"app": name}, Ports: ports},
		Where:    "test.yaml:1",
	}
}

// service leads to the pods with the label app=name.
func service(name string, ports ...model.ServicePort) *model.Service {
	return &model.Service{
		Name:     model.Name{Namespace: "default", Name: name},
		Type:     model.ClusterIP,
		Selector: map[string]string{"app": name},
		Ports:    ports,
		Where:    "test.yaml:9",
	}
}

// shop is a snapshot with a Deployment "web", a client and a Service.
func shop(pods int) *model.Snapshot {
	return &model.Snapshot{
		Number:    1,
		Complete:  true,
		Workloads: []*model.Workload{deployment("client", 1), deployment("web", pods, webPorts...)},
		Services: []*model.Service{service("web",
			model.ServicePort{Name: "web", Protocol: model.TCP, Port: 80, TargetName: "web"},
			model.ServicePort{Name: "dns", Protocol: model.UDP, Port: 53, TargetName: "dns"})},
	}
}
