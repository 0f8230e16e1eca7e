package kubetest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apimachinery/pkg/watch"
)

// Object is what the server keeps.
type Object interface {
	runtime.Object
	metav1.Object
}

// Request is what a client asked for, in the words of RBAC.
type Request struct{ Verb, Group, Resource string }

// Server is an http.Handler. Its methods may be called while it serves.
type Server struct {
	codecs serializer.CodecFactory
	scheme *runtime.Scheme

	mu sync.Mutex
	// version is the newest resourceVersion, oldest the first from which a watch
	// can start.
	version, oldest uint64
	objects         map[string]map[string]Object // by resource, then namespace/name
	// sorted are the names of objects in order, nil where that has to be made again.
	sorted  map[string][]string
	history []change
	// changed is closed when there is something for the watches to do.
	changed chan struct{}
	// How often that was asked for so far.
	bookmarks, expiries, cuts int
	torn                      bool
	watches                   map[string]int
	requests                  []Request
	fault                     func(http.ResponseWriter, *http.Request) bool
	stale                     bool
}

// change is one version of an object.
type change struct {
	version   uint64
	resource  string
	kind      watch.EventType
	now, then Object // then is nil where there was none
}

// New makes a server that has the Service default/kubernetes, its EndpointSlice
// and nothing else.
func New() *Server {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	s := &Server{
		scheme: scheme, codecs: serializer.NewCodecFactory(scheme), version: 100, oldest: 100,
		objects: map[string]map[string]Object{}, sorted: map[string][]string{}, changed: make(chan struct{}), watches: map[string]int{},
	}
	for resource := range resources {
		s.objects[resource] = map[string]Object{}
	}
	if err := s.Apply(own); err != nil {
		panic(err)
	}
	return s
}

// own is what every API server has.
const own = `
apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default, labels: {component: apiserver, provider: kubernetes}}
spec: {type: ClusterIP, clusterIP: 10.111.0.1, clusterIPs: [10.111.0.1], ports: [{name: https, protocol: TCP, port: 443, targetPort: 6443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kubernetes, namespace: default, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
ports: [{name: https, protocol: TCP, port: 6443}]
endpoints: [{addresses: [192.0.2.1], conditions: {ready: true}}]
`

// resources are those the server knows, with the kind of their objects.
var resources = map[string]schema.GroupVersionKind{
	"services":       corev1.SchemeGroupVersion.WithKind("Service"),
	"nodes":          corev1.SchemeGroupVersion.WithKind("Node"),
	"pods":           corev1.SchemeGroupVersion.WithKind("Pod"),
	"configmaps":     corev1.SchemeGroupVersion.WithKind("ConfigMap"),
	"deployments":    appsv1.SchemeGroupVersion.WithKind("Deployment"),
	"endpointslices": discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"),
}

func resourceOf(obj Object) string {
	switch obj.(type) {
	case *corev1.Service:
		return "services"
	case *corev1.Node:
		return "nodes"
	case *corev1.Pod:
		return "pods"
	case *corev1.ConfigMap:
		return "configmaps"
	case *appsv1.Deployment:
		return "deployments"
	case *discoveryv1.EndpointSlice:
		return "endpointslices"
	}
	panic(fmt.Sprintf("no resource for %T", obj))
}

func name(obj Object) string { return obj.GetNamespace() + "/" + obj.GetName() }

// Apply puts the objects of a YAML text, in the namespace "default" where they
// name none.
func (s *Server) Apply(text string) error {
	all, err := s.parse(text)
	if err == nil {
		s.Put(all...)
	}
	return err
}

// Remove deletes the objects that a YAML text names.
func (s *Server) Remove(text string) error {
	all, err := s.parse(text)
	if err == nil {
		s.Delete(all...)
	}
	return err
}

func (s *Server) parse(text string) ([]Object, error) {
	var all []Object
	for documents := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text))); ; {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(document)) == "" {
			continue
		}
		read, err := s.decode(document)
		if err != nil {
			return nil, err
		}
		all = append(all, read...)
	}
}

// decode reads one object, or those of a List.
func (s *Server) decode(document []byte) ([]Object, error) {
	obj, _, err := s.codecs.UniversalDeserializer().Decode(document, nil, nil)
	if err != nil {
		return nil, err
	}
	list, ok := obj.(*corev1.List)
	if !ok {
		o := obj.(Object)
		if _, node := obj.(*corev1.Node); !node && o.GetNamespace() == "" {
			o.SetNamespace(metav1.NamespaceDefault)
		}
		return []Object{o}, nil
	}
	var all []Object
	for _, item := range list.Items {
		one, err := s.decode(item.Raw)
		if err != nil {
			return nil, err
		}
		all = append(all, one...)
	}
	return all, nil
}

// Put adds or replaces objects, each as one change.
func (s *Server) Put(all ...Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range all {
		then := s.objects[resourceOf(o)][name(o)]
		kind := watch.Added
		if then != nil {
			kind = watch.Modified
		}
		s.note(kind, o.DeepCopyObject().(Object), then)
	}
}

// Delete removes objects; those that are not there are passed over.
func (s *Server) Delete(all ...Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range all {
		if then := s.objects[resourceOf(o)][name(o)]; then != nil {
			s.note(watch.Deleted, then.DeepCopyObject().(Object), then)
		}
	}
}

// note makes one change. It is called with s.mu held.
func (s *Server) note(kind watch.EventType, now, then Object) {
	s.version++
	now.SetResourceVersion(strconv.FormatUint(s.version, 10))
	if born := now.GetCreationTimestamp(); born.IsZero() {
		now.SetCreationTimestamp(metav1.Now())
	}
	of := s.objects[resourceOf(now)]
	if kind == watch.Deleted {
		delete(of, name(now))
	} else {
		of[name(now)] = now
	}
	if kind != watch.Modified {
		s.sorted[resourceOf(now)] = nil
	}
	s.history = append(s.history, change{s.version, resourceOf(now), kind, now, then})
	s.stir()
}

// stir wakes the watches. It is called with s.mu held.
func (s *Server) stir() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Fault is asked before every request is served; if it returns true it has
// answered, or the request is dropped. Nil is none.
func (s *Server) Fault(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Bookmark sends a bookmark to every watch that asked for them.
func (s *Server) Bookmark() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bookmarks++
	s.stir()
}

// Cut ends every watch: in good order, or torn, with half an event and a broken
// connection.
func (s *Server) Cut(torn bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cuts, s.torn = s.cuts+1, torn
	s.stir()
}

// Compact forgets all changes so far: watches from before get 410.
func (s *Server) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldest, s.history = s.version, nil
}

// Expire ends the watches that are open with 410.
func (s *Server) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expiries++
	s.stir()
}

// Stale lets no list be continued any more: 410. The first page is still served.
func (s *Server) Stale(stale bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stale = stale
}

// Restore is what a restart with an older state does: watches are cut without a
// word, the resourceVersion goes back to version, and of the objects only those
// are left that keep says.
func (s *Server) Restore(version uint64, keep func(Object) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, of := range s.objects {
		maps.DeleteFunc(of, func(_ string, o Object) bool { return !keep(o) })
	}
	clear(s.sorted)
	s.version, s.oldest, s.history = version, version, nil
	s.cuts, s.torn = s.cuts+1, true
	s.stir()
}

// Watches is how many watches of a resource are open.
func (s *Server) Watches(resource string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.watches[resource]
}

// Requests are all that came, in order, whatever became of them.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Refuse answers with a Kubernetes Status.
func Refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q,"message":%q}`, code, reason, message)
}

// Expired is the status of what is too old.
var expired = metav1.Status{
	TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
	Status:   metav1.StatusFailure, Code: http.StatusGone, Reason: metav1.StatusReasonExpired,
	Message: "too old resource version",
}

// grace is how long a watch that is not closed by its client is kept at most.
const grace = 10 * time.Minute
